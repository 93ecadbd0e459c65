// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IAccessControl} from "@openzeppelin/contracts/access/IAccessControl.sol";
import {Ownable} from "@openzeppelin/contracts/access/Ownable.sol";
import {IGovernor} from "@openzeppelin/contracts/governance/IGovernor.sol";
import {TimelockController} from "@openzeppelin/contracts/governance/TimelockController.sol";
import {Network} from "./Base.sol";
import {InferToken} from "../src/InferToken.sol";
import {ModelRegistry} from "../src/ModelRegistry.sol";

/// Who may decide what, and that nothing takes effect unseen.
contract GovernanceTest is Network {
    address private constant VOTER = address(0x707E);

    struct Proposal {
        address[] targets;
        uint256[] values;
        bytes[] calls;
        string text;
        uint256 id;
    }

    function setUp() public {
        deploy();
        give(VOTER, 50_000_000e6);
        VM.prank(VOTER);
        token.delegate(VOTER);
        VM.warp(START + 1);
    }

    function propose(address target, bytes memory call) private returns (Proposal memory p) {
        (p.targets, p.values, p.calls) = (new address[](1), new uint256[](1), new bytes[](1));
        (p.targets[0], p.calls[0], p.text) = (target, call, string(abi.encode("decision", block.timestamp)));
        VM.prank(VOTER);
        p.id = governor.propose(p.targets, p.values, p.calls, p.text);
    }

    function vote(Proposal memory p) private {
        VM.warp(block.timestamp + VOTING_DELAY + 1);
        VM.prank(VOTER);
        governor.castVote(p.id, 1);
        VM.warp(block.timestamp + VOTING_PERIOD);
    }

    function carryOut(Proposal memory p) private {
        vote(p);
        governor.queue(p.targets, p.values, p.calls, keccak256(bytes(p.text)));
        VM.warp(block.timestamp + TIMELOCK_DELAY);
        governor.execute(p.targets, p.values, p.calls, keccak256(bytes(p.text)));
    }

    function testAVoteListsAModelAndWithdrawsItAgain() public {
        carryOut(propose(address(registry), abi.encodeCall(registry.admitModel, ("second", someModel(2)))));
        assert(registry.model("second").active);
        eq(registry.modelIds().length, 2, "models");
        carryOut(propose(address(registry), abi.encodeCall(registry.withdrawModel, ("second"))));
        assert(!registry.model("second").active);
    }

    function testAVoteReplacesTheSettler() public {
        bytes32 role = settlement.SETTLER_ROLE();
        carryOut(propose(address(settlement), abi.encodeCall(settlement.grantRole, (role, bob))));
        carryOut(propose(address(settlement), abi.encodeCall(settlement.revokeRole, (role, SETTLER))));
        assert(settlement.hasRole(role, bob) && !settlement.hasRole(role, SETTLER));
    }

    /// The admin that skips the timelock: who deployed, the settler, the guardian, the governor itself, anybody.
    function testNobodySkipsTheTimelock() public {
        bytes32 role = settlement.SETTLER_ROLE();
        bytes32 admin = settlement.DEFAULT_ADMIN_ROLE();
        bytes32 proposer = timelock.PROPOSER_ROLE();
        address[5] memory callers = [DEPLOYER, SETTLER, GUARDIAN, address(governor), STRANGER];
        for (uint256 i = 0; i < callers.length; i++) {
            bytes memory unauthorized =
                abi.encodeWithSelector(IAccessControl.AccessControlUnauthorizedAccount.selector, callers[i], admin);
            bytes memory notOwner = abi.encodeWithSelector(Ownable.OwnableUnauthorizedAccount.selector, callers[i]);
            VM.startPrank(callers[i]);
            VM.expectRevert(unauthorized);
            settlement.grantRole(role, callers[i]);
            VM.expectRevert(unauthorized);
            settlement.grantRole(admin, callers[i]);
            VM.expectRevert(notOwner);
            registry.admitModel("mine", someModel(3));
            VM.expectRevert(notOwner);
            registry.transferOwnership(callers[i]);
            VM.expectRevert(notOwner);
            staking.setMinimumStake(0);
            VM.expectRevert(notOwner);
            staking.transferOwnership(callers[i]);
            VM.expectRevert(unauthorized);
            timelock.grantRole(proposer, callers[i]);
            VM.expectRevert(abi.encodeWithSelector(TimelockController.TimelockUnauthorizedCaller.selector, callers[i]));
            timelock.updateDelay(0);
            if (callers[i] != address(governor)) {
                VM.expectRevert(
                    abi.encodeWithSelector(
                        IAccessControl.AccessControlUnauthorizedAccount.selector, callers[i], proposer
                    )
                );
                timelock.schedule(address(registry), 0, "", bytes32(0), bytes32(0), TIMELOCK_DELAY);
            }
            VM.stopPrank();
        }
        VM.prank(VOTER);
        VM.expectRevert();
        governor.setVotingPeriod(1);
    }

    function testADecisionWaitsEvenWhenAllAgree() public {
        Proposal memory p =
            propose(address(registry), abi.encodeCall(registry.withdrawModel, ("smollm2-135m-instruct")));
        VM.expectRevert();
        governor.queue(p.targets, p.values, p.calls, keccak256(bytes(p.text)));
        vote(p);
        VM.expectRevert();
        governor.execute(p.targets, p.values, p.calls, keccak256(bytes(p.text)));
        governor.queue(p.targets, p.values, p.calls, keccak256(bytes(p.text)));
        VM.warp(block.timestamp + TIMELOCK_DELAY - 1);
        VM.expectRevert();
        governor.execute(p.targets, p.values, p.calls, keccak256(bytes(p.text)));
        bytes32 salt = bytes20(address(governor)) ^ keccak256(bytes(p.text));
        VM.expectRevert();
        timelock.executeBatch(p.targets, p.values, p.calls, bytes32(0), salt);
        assert(registry.model("smollm2-135m-instruct").active);
        VM.warp(block.timestamp + 1);
        governor.execute(p.targets, p.values, p.calls, keccak256(bytes(p.text)));
        assert(!registry.model("smollm2-135m-instruct").active);
    }

    function testBelowTheQuorumNothingPasses() public {
        uint256 quorum = governor.quorum(block.timestamp - 1);
        eq(quorum, token.totalSupply() * QUORUM_PERCENT / 100, "quorum");
        VM.prank(VOTER);
        require(token.transfer(DEPLOYER, 50_000_000e6 - quorum + 1));
        Proposal memory p =
            propose(address(registry), abi.encodeCall(registry.withdrawModel, ("smollm2-135m-instruct")));
        vote(p);
        assert(governor.state(p.id) == IGovernor.ProposalState.Defeated);
        give(VOTER, 1);
        VM.warp(block.timestamp + 1);
        p = propose(address(registry), abi.encodeCall(registry.withdrawModel, ("smollm2-135m-instruct")));
        vote(p);
        assert(governor.state(p.id) == IGovernor.ProposalState.Succeeded);
    }

    /// Tokens that are borrowed for a moment, or bought after the proposal, do not vote.
    function testTokensVoteAtTheSnapshotOnly() public {
        Proposal memory p =
            propose(address(registry), abi.encodeCall(registry.withdrawModel, ("smollm2-135m-instruct")));
        VM.warp(block.timestamp + VOTING_DELAY + 1);
        give(bob, 500_000_000e6);
        VM.prank(bob);
        token.delegate(bob);
        VM.prank(bob);
        eq(governor.castVote(p.id, 0), 0, "weight");
        eq(governor.proposalThreshold(), PROPOSAL_THRESHOLD, "threshold");
        VM.prank(STRANGER);
        VM.expectRevert(
            abi.encodeWithSelector(
                IGovernor.GovernorInsufficientProposerVotes.selector, STRANGER, 0, PROPOSAL_THRESHOLD
            )
        );
        governor.propose(p.targets, p.values, p.calls, "mine");
    }
}

/// The token.
contract TokenTest is Network {
    function setUp() public {
        deploy();
    }

    function testTheSupplyIsFixedAndShrinksOnlyByBurning() public {
        eq(token.decimals(), 6, "decimals");
        eq(token.totalSupply(), 10 ** 9 * 10 ** 6, "supply");
        eq(token.balanceOf(DEPLOYER), token.totalSupply(), "holder");
        (bool ok,) = address(token).call(abi.encodeWithSignature("mint(address,uint256)", DEPLOYER, 1));
        assert(!ok);
        VM.prank(DEPLOYER);
        token.burn(7);
        eq(token.totalSupply(), 10 ** 15 - 7, "burned");
    }

    function testVotesFollowTheDelegationAndTheClockIsTime() public {
        eq(token.clock(), block.timestamp, "clock");
        eq(keccak256(bytes(token.CLOCK_MODE())), keccak256("mode=timestamp"), "mode");
        VM.prank(DEPLOYER);
        token.delegate(alice);
        give(bob, 5);
        eq(token.getVotes(alice), token.totalSupply() - 5, "votes");
    }
}

/// The registry.
contract RegistryTest is Network {
    string private constant ID = "smollm2-135m-instruct";

    function setUp() public {
        deploy();
        VM.startPrank(address(timelock));
    }

    function expectBad(string memory field, ModelRegistry.Model memory model) private {
        VM.expectRevert(abi.encodeWithSelector(ModelRegistry.BadValue.selector, field));
        registry.admitModel("new", model);
    }

    function testServicesCanFollowEveryChange() public {
        ModelRegistry.Model memory model = someModel(2);
        eq(registry.revision(), 1, "revision");
        VM.expectEmit(true, true, true, true);
        emit ModelRegistry.ModelAdmitted(keccak256("new"), "new", model, 2);
        registry.admitModel("new", model);
        VM.expectEmit(true, true, true, true);
        emit ModelRegistry.ModelTermsChanged(keccak256("new"), "new", 800_000, 7, 3);
        registry.setTerms("new", 800_000, 7);
        VM.expectEmit(true, true, true, true);
        emit ModelRegistry.ModelWithdrawn(keccak256("new"), "new", 4);
        registry.withdrawModel("new");
        VM.expectEmit(true, true, true, true);
        emit ModelRegistry.ReleaseApproved("release", "0.1.0", 5);
        registry.approveRelease("release", "0.1.0");
        VM.expectEmit(true, true, true, true);
        emit ModelRegistry.ReleaseWithdrawn("release", 6);
        registry.withdrawRelease("release");
        VM.expectEmit(true, true, true, true);
        emit ModelRegistry.CalibrationChanged("calibration", 7);
        registry.setCalibration("calibration");
        eq(registry.calibrationHash(), "calibration", "calibration");
    }

    function testTheWholeStateCanBeRead() public {
        registry.admitModel("new", someModel(2));
        registry.approveRelease("one", "1");
        registry.approveRelease("two", "2");
        registry.withdrawRelease("one");
        string[] memory ids = registry.modelIds();
        assert(ids.length == 2 && keccak256(bytes(ids[0])) == keccak256(bytes(ID)));
        assert(registry.releases().length == 1 && registry.isApproved("two") && !registry.isApproved("one"));
        eq(keccak256(abi.encode(registry.model("new"))), keccak256(abi.encode(someModel(2))), "what was listed");
        assert(!registry.model("never").active);
    }

    function testAWithdrawnModelStaysReadableAndCanComeBack() public {
        registry.withdrawModel(ID);
        eq(registry.model(ID).weightsRoot, someModel(1).weightsRoot, "weights");
        VM.expectRevert(abi.encodeWithSelector(ModelRegistry.NoSuchModel.selector, ID));
        registry.withdrawModel(ID);
        VM.expectRevert(abi.encodeWithSelector(ModelRegistry.NoSuchModel.selector, ID));
        registry.setTerms(ID, 1, 1);
        registry.admitModel(ID, someModel(1));
        assert(registry.model(ID).active);
        eq(registry.modelIds().length, 1, "listed once");
    }

    function testValuesThatCannotBeRightAreNamed() public {
        ModelRegistry.Model memory model = someModel(2);
        model.weightsRoot = 0;
        expectBad("weightsRoot", model);
        (model.weightsRoot, model.tokenizerHash) = ("w", 0);
        expectBad("tokenizerHash", model);
        (model.tokenizerHash, model.templateHash) = ("t", 0);
        expectBad("templateHash", model);
        (model.templateHash, model.endTokensHash) = ("t", 0);
        expectBad("endTokensHash", model);
        (model.endTokensHash, model.vocabSize) = ("e", 0);
        expectBad("vocabSize", model);
        (model.vocabSize, model.contextLength) = (1, 0);
        expectBad("contextLength", model);
        (model.contextLength, model.similarityThreshold) = (1, 1_000_001);
        expectBad("similarityThreshold", model);
        (model.similarityThreshold, model.priceCap) = (1_000_000, 0);
        expectBad("priceCap", model);
        (model.priceCap, model.active) = (1, false);
        expectBad("active", model);
        model.active = true;
        VM.expectRevert(abi.encodeWithSelector(ModelRegistry.BadValue.selector, "id"));
        registry.admitModel("", model);
        VM.expectRevert(abi.encodeWithSelector(ModelRegistry.BadValue.selector, "id"));
        registry.admitModel(string(new bytes(65)), model);
        VM.expectRevert(abi.encodeWithSelector(ModelRegistry.BadValue.selector, "release"));
        registry.approveRelease(0, "none");
        registry.approveRelease("one", "1");
        VM.expectRevert(abi.encodeWithSelector(ModelRegistry.AlreadyApproved.selector, bytes32("one")));
        registry.approveRelease("one", "1");
        VM.expectRevert(abi.encodeWithSelector(ModelRegistry.NotApproved.selector, bytes32("two")));
        registry.withdrawRelease("two");
        VM.expectRevert(abi.encodeWithSelector(ModelRegistry.BadValue.selector, "calibrationHash"));
        registry.setCalibration(0);
    }

    function testTheListsAreBounded() public {
        uint256 most = registry.MAX_LISTED();
        for (uint256 i = 1; i < most; i++) {
            registry.admitModel(string(abi.encode(i)), someModel(2));
        }
        VM.expectRevert(abi.encodeWithSelector(ModelRegistry.BadValue.selector, "models"));
        registry.admitModel("one more", someModel(2));
        eq(registry.modelIds().length, most, "models");
    }
}
