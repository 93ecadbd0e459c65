// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Ownable} from "@openzeppelin/contracts/access/Ownable.sol";
import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {Network} from "./Base.sol";
import {InferaSettlement} from "../src/InferaSettlement.sol";
import {InferaStaking} from "../src/InferaStaking.sol";

/// Signs as an operator's node does.
abstract contract NodeTools is Network {
    uint256 internal constant OPERATOR_KEY = 0x09E4;
    uint256 internal constant NODE_KEY = 0x40DE;
    bytes32 internal constant NODE = bytes32(uint256(0x4));
    address internal operator;

    function slotOf(uint256 request) internal pure returns (InferaStaking.Slot memory) {
        return InferaStaking.Slot(keccak256(abi.encode("request", request)), 1, NODE);
    }

    function binding(uint256 operatorKey, uint256 nodeKey, bytes32 node, uint256 expiryMs)
        internal
        view
        returns (InferaStaking.Binding memory)
    {
        address signer = VM.addr(nodeKey);
        bytes32 message = keccak256(
            abi.encode(keccak256("NodeBinding(bytes32 node,address signer,uint256 expiryMs)"), node, signer, expiryMs)
        );
        return
            InferaStaking.Binding(signer, expiryMs, signature(operatorKey, digest(CHAIN, address(settlement), message)));
    }

    function bound() internal view returns (InferaStaking.Binding memory) {
        return binding(OPERATOR_KEY, NODE_KEY, NODE, (START + 30 days) * 1_000);
    }

    function commitmentMessage(InferaStaking.Slot memory slot, bytes32 commitment) internal pure returns (bytes32) {
        return keccak256(
            abi.encode(
                keccak256("SlotCommitment(bytes32 requestHash,uint32 attempt,bytes32 node,bytes32 commitment)"),
                slot.requestHash,
                slot.attempt,
                slot.node,
                commitment
            )
        );
    }

    function revealMessage(InferaStaking.Slot memory slot, InferaStaking.Reveal memory reveal)
        internal
        pure
        returns (bytes32)
    {
        return keccak256(
            abi.encode(
                keccak256(
                    "SlotReveal(bytes32 requestHash,uint32 attempt,bytes32 node,bytes32 tokensRoot,bytes32 fingerprintRoot,uint8 finish,bytes32 salt)"
                ),
                slot.requestHash,
                slot.attempt,
                slot.node,
                reveal.tokensRoot,
                reveal.fingerprintRoot,
                reveal.finish,
                reveal.salt
            )
        );
    }

    function committed(InferaStaking.Slot memory slot, bytes32 commitment)
        internal
        view
        returns (InferaStaking.Commitment memory)
    {
        bytes32 hash = digest(CHAIN, address(settlement), commitmentMessage(slot, commitment));
        return InferaStaking.Commitment(commitment, signature(NODE_KEY, hash), bound());
    }

    function revealed(InferaStaking.Slot memory slot, uint256 answer)
        internal
        view
        returns (InferaStaking.Reveal memory reveal)
    {
        reveal = InferaStaking.Reveal({
            tokensRoot: keccak256(abi.encode("tokens", answer)),
            fingerprintRoot: keccak256(abi.encode("fingerprints", answer)),
            finish: 1,
            salt: keccak256("salt"),
            signature: "",
            binding: bound()
        });
        reveal.signature = signature(NODE_KEY, digest(CHAIN, address(settlement), revealMessage(slot, reveal)));
    }

    function stakeFor(address who, uint256 amount) internal {
        give(who, amount);
        VM.startPrank(who);
        token.approve(address(staking), amount);
        staking.stake(who, amount);
        VM.stopPrank();
    }
}

/// Stake, unbonding, and the evidence that costs it.
contract StakingTest is NodeTools {
    address private constant REPORTER = address(0x4E9);
    uint256 private constant STAKE = 10_000e6;

    function setUp() public {
        deploy();
        operator = VM.addr(OPERATOR_KEY);
        stakeFor(operator, STAKE);
    }

    function active(address who) private view returns (uint256) {
        return staking.position(who).active;
    }

    function expectTwo(
        bytes memory reason,
        InferaStaking.Slot memory slot,
        InferaStaking.Commitment memory first,
        InferaStaking.Commitment memory second
    ) private {
        VM.prank(REPORTER);
        VM.expectRevert(reason);
        staking.slashTwoCommitments(slot, first, second);
    }

    // ---- stake ----

    function testStakeCountsFromTheMinimumOn() public {
        assert(staking.isEligible(operator) && !staking.isEligible(STRANGER));
        stakeFor(STRANGER, MINIMUM_STAKE - 1);
        assert(!staking.isEligible(STRANGER));
        stakeFor(STRANGER, 1);
        assert(staking.isEligible(STRANGER));
        VM.prank(STRANGER);
        VM.expectRevert(abi.encodeWithSelector(Ownable.OwnableUnauthorizedAccount.selector, STRANGER));
        staking.setMinimumStake(0);
        VM.prank(address(timelock));
        staking.setMinimumStake(0);
        assert(!staking.isEligible(alice));
    }

    function testUnbondingWaitsAndPaysOnce() public {
        VM.prank(operator);
        staking.unstake(STAKE / 4);
        eq(active(operator), STAKE - STAKE / 4, "active");
        VM.warp(START + UNBONDING - 1);
        VM.prank(operator);
        VM.expectRevert(abi.encodeWithSelector(InferaStaking.NotBefore.selector, START + UNBONDING));
        staking.withdraw();
        VM.warp(START + UNBONDING);
        VM.prank(operator);
        eq(staking.withdraw(), STAKE / 4, "paid");
        VM.prank(operator);
        VM.expectRevert(InferaStaking.NothingUnbonding.selector);
        staking.withdraw();
        eq(token.balanceOf(operator), STAKE / 4, "balance");
    }

    function testNobodyUnstakesMoreThanItHas(uint128 amount) public {
        amount = uint128(bound(amount, STAKE + 1, type(uint128).max));
        VM.prank(operator);
        VM.expectRevert(abi.encodeWithSelector(InferaStaking.BeyondStake.selector, STAKE, amount));
        staking.unstake(amount);
        VM.prank(STRANGER);
        VM.expectRevert(abi.encodeWithSelector(InferaStaking.BeyondStake.selector, 0, 1));
        staking.unstake(1);
    }

    /// A challenge must find the stake still there: the constructor insists.
    function testUnbondingIsLongerThanTheChallenge() public {
        VM.expectRevert(InferaStaking.BadArgument.selector);
        new InferaStaking(address(timelock), token, settlement, CHALLENGE, 0);
        new InferaStaking(address(timelock), token, settlement, CHALLENGE + 1, 0);
        VM.expectRevert(InferaStaking.BadArgument.selector);
        new InferaStaking(address(timelock), token, settlement, 60 days + 1, 0);
    }

    // ---- evidence ----

    function testTwoCommitmentsForOneSlotCostHalf() public {
        InferaStaking.Slot memory slot = slotOf(1);
        bytes32 slotHash = staking.hashSlot(operator, slot);
        uint256 supply = token.totalSupply();
        VM.prank(REPORTER);
        VM.expectEmit(true, true, true, true);
        emit InferaStaking.Slashed(operator, NODE, slotHash, REPORTER, STAKE / 2, STAKE / 20);
        staking.slashTwoCommitments(slot, committed(slot, "one"), committed(slot, "two"));
        eq(active(operator), STAKE / 2, "left");
        eq(token.balanceOf(REPORTER), STAKE / 20, "reporter");
        eq(token.totalSupply(), supply - STAKE / 2 + STAKE / 20, "burned");
        assert(staking.slashed(slotHash));
        eq(staking.totalStaked(), STAKE / 2, "total");
        eq(token.balanceOf(address(staking)), STAKE / 2, "balance");
    }

    function testTwoRevealsForOneSlotCostHalf() public {
        InferaStaking.Slot memory slot = slotOf(1);
        staking.slashTwoReveals(slot, revealed(slot, 1), revealed(slot, 2));
        eq(active(operator), STAKE / 2, "left");
    }

    function testARevealThatContradictsItsCommitmentCostsHalf() public {
        InferaStaking.Slot memory slot = slotOf(1);
        InferaStaking.Reveal memory said = revealed(slot, 1);
        bytes32 commitment = staking.commitmentOf(slot, revealed(slot, 2));
        staking.slashFalseReveal(slot, committed(slot, commitment), said);
        eq(active(operator), STAKE / 2, "left");
    }

    /// Whatever part of the reveal was changed after the commitment.
    function testEveryFieldOfARevealIsCommittedTo(uint8 field, bytes32 other) public {
        InferaStaking.Slot memory slot = slotOf(1);
        InferaStaking.Reveal memory reveal = revealed(slot, 1);
        bytes32 commitment = staking.commitmentOf(slot, reveal);
        if (field % 4 == 0) reveal.tokensRoot ^= other;
        if (field % 4 == 1) reveal.fingerprintRoot ^= other;
        if (field % 4 == 2) reveal.finish ^= uint8(uint256(other));
        if (field % 4 == 3) reveal.salt ^= other;
        VM.assume(field % 4 == 2 ? uint8(uint256(other)) != 0 : other != bytes32(0));
        reveal.signature = signature(NODE_KEY, digest(CHAIN, address(settlement), revealMessage(slot, reveal)));
        staking.slashFalseReveal(slot, committed(slot, commitment), reveal);
        eq(active(operator), STAKE / 2, "left");
    }

    /// An honest node says the same however often it is asked: nothing that it signs is evidence against it.
    function testAnHonestNodeIsNeverSlashed(uint64 request, uint64 answer) public {
        InferaStaking.Slot memory slot = slotOf(request);
        InferaStaking.Reveal memory reveal = revealed(slot, answer);
        InferaStaking.Commitment memory commitment = committed(slot, staking.commitmentOf(slot, reveal));
        bytes memory none = abi.encodeWithSelector(InferaStaking.NoContradiction.selector);
        expectTwo(none, slot, commitment, commitment);
        VM.expectRevert(none);
        staking.slashTwoReveals(slot, reveal, reveal);
        VM.expectRevert(none);
        staking.slashFalseReveal(slot, commitment, reveal);
        // What it said for another request or attempt is no statement about this slot.
        InferaStaking.Slot memory next = slotOf(uint256(request) + 1);
        InferaStaking.Commitment memory elsewhere = committed(next, "elsewhere");
        VM.expectRevert();
        staking.slashTwoCommitments(slot, commitment, elsewhere);
        next = InferaStaking.Slot(slot.requestHash, slot.attempt + 1, slot.node);
        elsewhere = committed(next, "another attempt");
        VM.expectRevert();
        staking.slashTwoCommitments(slot, commitment, elsewhere);
        eq(active(operator), STAKE, "stake");
    }

    function testNobodyPaysTwiceForOneSlot() public {
        InferaStaking.Slot memory slot = slotOf(1);
        staking.slashTwoCommitments(slot, committed(slot, "one"), committed(slot, "two"));
        bytes memory again =
            abi.encodeWithSelector(InferaStaking.AlreadySlashed.selector, staking.hashSlot(operator, slot));
        expectTwo(again, slot, committed(slot, "one"), committed(slot, "two"));
        expectTwo(again, slot, committed(slot, "two"), committed(slot, "three"));
        InferaStaking.Reveal memory said = revealed(slot, 1);
        VM.expectRevert(again);
        staking.slashFalseReveal(slot, committed(slot, "one"), said);
        // Another slot is another matter.
        slot = slotOf(2);
        staking.slashTwoCommitments(slot, committed(slot, "one"), committed(slot, "two"));
        eq(active(operator), STAKE / 4, "left");
    }

    function testStakeOnItsWayOutIsSlashedToo() public {
        VM.prank(operator);
        staking.unstake(STAKE * 9 / 10);
        InferaStaking.Slot memory slot = slotOf(1);
        staking.slashTwoCommitments(slot, committed(slot, "one"), committed(slot, "two"));
        eq(active(operator), 0, "active");
        eq(staking.position(operator).unbonding, STAKE / 2, "unbonding");
        VM.warp(START + UNBONDING);
        VM.prank(operator);
        eq(staking.withdraw(), STAKE / 2, "what is left");
        slot = slotOf(2);
        bytes memory nothing = abi.encodeWithSelector(InferaStaking.NothingStaked.selector, operator);
        expectTwo(nothing, slot, committed(slot, "one"), committed(slot, "two"));
    }

    function testForgedEvidenceCostsNothing() public {
        InferaStaking.Slot memory slot = slotOf(1);
        InferaStaking.Commitment memory good = committed(slot, "one");
        InferaStaking.Commitment memory forged = committed(slot, "two");
        // Signed by somebody else than the bound signer.
        forged.signature = signature(BOB_KEY, digest(CHAIN, address(settlement), commitmentMessage(slot, "two")));
        expectTwo(
            abi.encodeWithSelector(InferaStaking.NotTheSigner.selector, VM.addr(NODE_KEY), bob), slot, good, forged
        );
        // The reporter's own key, bound by a signature of its own: then the operators are two.
        forged.binding = binding(ALICE_KEY, BOB_KEY, NODE, (START + 1 days) * 1_000);
        expectTwo(abi.encodeWithSelector(InferaStaking.OperatorsDiffer.selector, operator, alice), slot, good, forged);
        // A true signature with another commitment put in, or for another chain or contract.
        forged = committed(slot, "two");
        forged.commitment = "three";
        VM.expectRevert();
        staking.slashTwoCommitments(slot, good, forged);
        forged = committed(slot, "two");
        forged.signature = signature(NODE_KEY, digest(1, address(settlement), commitmentMessage(slot, "two")));
        VM.expectRevert();
        staking.slashTwoCommitments(slot, good, forged);
        forged.signature = signature(NODE_KEY, digest(CHAIN, address(staking), commitmentMessage(slot, "two")));
        VM.expectRevert();
        staking.slashTwoCommitments(slot, good, forged);
        forged.signature = hex"1234";
        expectTwo(abi.encodeWithSelector(ECDSA.ECDSAInvalidSignatureLength.selector, 2), slot, good, forged);
        eq(active(operator), STAKE, "stake");
    }

    /// A node that took a second key in between answers for both.
    function testTwoKeysOfOneNodeAreOneNode() public {
        InferaStaking.Slot memory slot = slotOf(1);
        InferaStaking.Commitment memory second = committed(slot, "two");
        second.binding = binding(OPERATOR_KEY, BOB_KEY, NODE, (START + 1 days) * 1_000);
        second.signature = signature(BOB_KEY, digest(CHAIN, address(settlement), commitmentMessage(slot, "two")));
        staking.slashTwoCommitments(slot, committed(slot, "one"), second);
        eq(active(operator), STAKE / 2, "left");
    }

    /// Somebody who binds another's node to itself can hurt nobody but itself, and uses up nobody else's slot.
    function testASquatterProtectsNobody() public {
        InferaStaking.Slot memory slot = slotOf(1);
        stakeFor(alice, 2);
        InferaStaking.Commitment memory first = committed(slot, "one");
        InferaStaking.Commitment memory second = committed(slot, "two");
        first.binding = binding(ALICE_KEY, BOB_KEY, NODE, (START + 1 days) * 1_000);
        second.binding = first.binding;
        first.signature = signature(BOB_KEY, digest(CHAIN, address(settlement), commitmentMessage(slot, "one")));
        second.signature = signature(BOB_KEY, digest(CHAIN, address(settlement), commitmentMessage(slot, "two")));
        staking.slashTwoCommitments(slot, first, second);
        eq(active(alice), 1, "the squatter's");
        eq(active(operator), STAKE, "the operator's");
        staking.slashTwoCommitments(slot, committed(slot, "one"), committed(slot, "two"));
        eq(active(operator), STAKE / 2, "left");
    }

    function testAKeyThatLeaksLongAfterItsBindingIsWorthless() public {
        InferaStaking.Slot memory slot = slotOf(1);
        uint256 expiryMs = (START + 30 days) * 1_000;
        VM.warp(START + 30 days + UNBONDING + 1);
        bytes memory old = abi.encodeWithSelector(InferaStaking.BindingTooOld.selector, expiryMs);
        expectTwo(old, slot, committed(slot, "one"), committed(slot, "two"));
        VM.warp(START + 30 days + UNBONDING);
        staking.slashTwoCommitments(slot, committed(slot, "one"), committed(slot, "two"));
    }

    function testAnOperatorThatReportsItselfStillLoses(uint64 amount) public {
        uint256 staked = bound(amount, 1, 1_000_000e6);
        uint256 key = 0x5E1F;
        address cheat = VM.addr(key);
        stakeFor(cheat, staked);
        InferaStaking.Slot memory slot = slotOf(3);
        InferaStaking.Commitment memory first = committed(slot, "one");
        InferaStaking.Commitment memory second = committed(slot, "two");
        first.binding = binding(key, NODE_KEY, NODE, (START + 1 days) * 1_000);
        second.binding = first.binding;
        VM.prank(cheat);
        staking.slashTwoCommitments(slot, first, second);
        uint256 slashed = staked - active(cheat);
        assert(slashed * 2 >= staked && token.balanceOf(cheat) * 10 <= slashed);
        eq(staking.totalStaked(), STAKE + staked - slashed, "total");
        eq(token.balanceOf(address(staking)), staking.totalStaked(), "balance");
    }

    // ---- what Rust computes ----

    /// Golden values that `shared/protocol` has in its own tests: domain {31337, 0x09..09}, slot {0x01.., 2, 0x03..}, tokens
    /// 5 6, sixteen fingerprint bytes 0x07, finish eos, salt 0x06...
    function testTheEncodingsAreRusts() public {
        address contract_ = address(0x0909090909090909090909090909090909090909);
        VM.etch(contract_, address(settlement).code);
        staking = new InferaStaking(address(timelock), token, InferaSettlement(contract_), UNBONDING, 0);
        InferaStaking.Slot memory slot = InferaStaking.Slot(fill(1), 2, fill(3));
        InferaStaking.Reveal memory reveal;
        reveal.tokensRoot = 0x41ba5dd80c26b0b008fea16f8e4b6e530bced44bfcde3070fb23a6aacf7bfd40;
        reveal.fingerprintRoot = 0x933b6c3495d1fa1af37039cb1ad2bfe96ddb21cfc388dce7ddb9a737bdfb526d;
        reveal.finish = 1;
        reveal.salt = fill(6);
        bytes32 commitment = 0x830ea93d385484d0c7450d7c3452462a760a07b1d3bdf17c75802a68ef21eac2;
        eq(staking.commitmentOf(slot, reveal), commitment, "commitment");
        eq(
            digest(CHAIN, contract_, commitmentMessage(slot, commitment)),
            0x6f168a2eda7e2101c9894f220904ba1fa21136a60ce251f1d29591d0051fd827,
            "SlotCommitment"
        );
        eq(
            digest(CHAIN, contract_, revealMessage(slot, reveal)),
            0xc7fecd5f0fe1416fb777e575e9abc78e7e96efd86bff473cca06554f3105f3ad,
            "SlotReveal"
        );
        (, string memory name, string memory version, uint256 chainId, address verifying,,) =
            InferaSettlement(contract_).eip712Domain();
        assert(keccak256(bytes(name)) == keccak256("Infera") && keccak256(bytes(version)) == keccak256("1"));
        assert(chainId == CHAIN && verifying == contract_);
        bytes32 separated = keccak256(abi.encodePacked(bytes2(0x1901), staking.domainSeparator(), fill(8)));
        eq(separated, digest(CHAIN, contract_, fill(8)), "domain");
    }

    function fill(uint8 value) private pure returns (bytes32) {
        return bytes32(uint256(value) * (type(uint256).max / 255));
    }
}
