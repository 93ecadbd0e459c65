// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IAccessControl} from "@openzeppelin/contracts/access/IAccessControl.sol";
import {Pausable} from "@openzeppelin/contracts/utils/Pausable.sol";
import {Network} from "./Base.sol";
import {InferaSettlement} from "../src/InferaSettlement.sol";

/// The queue of reward roots, vetoes, claims.
contract RewardsTest is Network {
    address private constant CARA = address(0xCA4A);
    address private constant DAN = address(0xDA4);

    function setUp() public {
        deploy();
        fundPool(1_000_000);
    }

    function two(uint256 cara, uint256 dan)
        private
        pure
        returns (address[] memory operators, uint256[] memory amounts)
    {
        (operators, amounts) = (new address[](2), new uint256[](2));
        (operators[0], operators[1]) = (CARA, DAN);
        (amounts[0], amounts[1]) = (cara, dan);
    }

    function queueTwo(uint256 cara, uint256 dan) private returns (uint64 id, bytes32[] memory tree) {
        (address[] memory operators, uint256[] memory amounts) = two(cara, dan);
        return queue(operators, amounts, cara + dan);
    }

    function expectClaim(bytes memory reason, uint64 id, address operator, uint256 amount, bytes32[] memory proof)
        private
    {
        VM.prank(operator);
        VM.expectRevert(reason);
        settlement.claim(id, operator, amount, proof);
    }

    function testAClaimPaysTheDifferenceToTheOperatorOnly() public {
        (uint64 id, bytes32[] memory tree) = queueTwo(300, 200);
        VM.warp(block.timestamp + CHALLENGE);
        // Anybody may pay the gas.
        VM.prank(STRANGER);
        VM.expectEmit(true, true, true, true);
        emit InferaSettlement.Claimed(CARA, id, 300, 300);
        eq(settlement.claim(id, CARA, 300, proofOf(tree, 0)), 300, "paid");
        eq(token.balanceOf(CARA), 300, "operator");
        eq(token.balanceOf(STRANGER), 0, "who claimed for it");

        (id, tree) = queueTwo(450, 200);
        VM.warp(block.timestamp + CHALLENGE);
        VM.prank(CARA);
        eq(settlement.claim(id, CARA, 450, proofOf(tree, 0)), 150, "the difference");
        eq(settlement.claimed(CARA), 450, "claimed");
        VM.prank(DAN);
        settlement.claim(id, DAN, 200, proofOf(tree, 1));
        eq(settlement.totalClaimed(), 650, "total");
    }

    function testNobodyClaimsTwice() public {
        (uint64 first, bytes32[] memory old) = queueTwo(300, 200);
        VM.warp(block.timestamp + CHALLENGE);
        settlement.claim(first, CARA, 300, proofOf(old, 0));
        bytes memory nothing = abi.encodeWithSelector(InferaSettlement.NothingToClaim.selector, 300);
        expectClaim(nothing, first, CARA, 300, proofOf(old, 0));
        // Not by another root either, nor by an older one after a newer one.
        (uint64 second, bytes32[] memory tree) = queueTwo(300, 250);
        VM.warp(block.timestamp + CHALLENGE);
        expectClaim(nothing, second, CARA, 300, proofOf(tree, 0));
        settlement.claim(second, DAN, 250, proofOf(tree, 1));
        nothing = abi.encodeWithSelector(InferaSettlement.NothingToClaim.selector, 250);
        expectClaim(nothing, first, DAN, 200, proofOf(old, 1));
    }

    function testNobodyClaimsAnothersOrAnInventedReward(uint256 amount, uint8 flip) public {
        (uint64 id, bytes32[] memory tree) = queueTwo(300, 200);
        VM.warp(block.timestamp + CHALLENGE);
        bytes memory bad = abi.encodeWithSelector(InferaSettlement.BadProof.selector);
        expectClaim(bad, id, STRANGER, 300, proofOf(tree, 0));
        expectClaim(bad, id, DAN, 300, proofOf(tree, 0));
        expectClaim(bad, id, CARA, 200, proofOf(tree, 1));
        expectClaim(bad, id, CARA, 300, new bytes32[](0));
        VM.assume(amount != 300);
        expectClaim(bad, id, CARA, amount, proofOf(tree, 0));
        bytes32[] memory proof = proofOf(tree, 0);
        proof[0] ^= bytes32(uint256(1) << flip);
        expectClaim(bad, id, CARA, 300, proof);
        eq(settlement.totalClaimed(), 0, "claimed");
    }

    /// An inner node of the tree, taken for a leaf, needs 64 bytes that hash to it once: leaves are hashed twice.
    function testAnInnerNodeIsNoLeaf() public {
        (uint64 id, bytes32[] memory tree) = queueTwo(300, 200);
        VM.warp(block.timestamp + CHALLENGE);
        address operator = address(uint160(uint256(tree[1])));
        expectClaim(
            abi.encodeWithSelector(InferaSettlement.BadProof.selector), id, operator, uint256(tree[2]), new bytes32[](0)
        );
    }

    function testNothingIsClaimedBeforeTheChallengeIsOver() public {
        (uint64 id, bytes32[] memory tree) = queueTwo(300, 200);
        uint64 matures = settlement.rewards(id).maturesAt;
        VM.warp(matures - 1);
        bytes memory early = abi.encodeWithSelector(InferaSettlement.NotBefore.selector, matures);
        expectClaim(early, id, CARA, 300, proofOf(tree, 0));
        eq(settlement.claimableId(), 0, "claimable");
        VM.warp(matures);
        eq(settlement.claimableId(), id, "claimable");
        settlement.claim(id, CARA, 300, proofOf(tree, 0));
        expectClaim(abi.encodeWithSelector(InferaSettlement.NoSuchRoot.selector, 9), 9, DAN, 200, proofOf(tree, 1));
    }

    /// Roots come far more often than the challenge delay is long: somebody can always claim.
    function testFrequentRootsStarveNobody() public {
        uint256 every = CHALLENGE / 24;
        bytes32[][] memory trees = new bytes32[][](101);
        uint256 paid = 0;
        for (uint256 i = 1; i <= 100; i++) {
            (, trees[i]) = queueTwo(100 * i, 7 * i);
            VM.warp(block.timestamp + every);
            uint64 id = settlement.claimableId();
            eq(id, i < 24 ? 0 : i - 23, "the root of a day ago pays");
            if (id != 0) paid += settlement.claim(id, CARA, 100 * uint256(id), proofOf(trees[id], 0));
        }
        eq(paid, 7_700, "claimed on the way");
    }

    function testAFullQueueTakesTheNextWhenTheOldestPays() public {
        uint64 most = settlement.MAX_PENDING();
        uint256 began = block.timestamp;
        for (uint256 i = 1; i <= most; i++) {
            queueTwo(i, 0);
            VM.warp(began + i);
        }
        InferaSettlement.Batch memory batch = post(keccak256("x"));
        VM.prank(SETTLER);
        VM.expectRevert(abi.encodeWithSelector(InferaSettlement.QueueFull.selector, began + CHALLENGE));
        settlement.queueRewards(batch, 500);
        VM.warp(began + CHALLENGE);
        VM.prank(SETTLER);
        settlement.queueRewards(batch, 500);
        // The guardian can still strike all that wait in one transaction.
        bytes32 second = settlement.rewards(2).root;
        VM.prank(GUARDIAN);
        settlement.veto(2, second);
        eq(settlement.lastRewardId(), 1, "last");
    }

    function testAVetoStrikesTheRootAndAllThatBuildOnIt() public {
        (uint64 good, bytes32[] memory tree) = queueTwo(300, 200);
        VM.warp(block.timestamp + CHALLENGE / 2);
        (uint64 forged, bytes32[] memory stolen) = queueOne(STRANGER, 900_000);
        queueOne(STRANGER, 900_001);
        bytes32 root = settlement.rewards(forged).root;
        VM.prank(GUARDIAN);
        VM.expectRevert(abi.encodeWithSelector(InferaSettlement.NoSuchRoot.selector, forged));
        settlement.veto(forged, tree[0]);
        VM.prank(GUARDIAN);
        VM.expectEmit(true, true, true, true);
        emit InferaSettlement.RewardRootVetoed(forged, root, GUARDIAN);
        settlement.veto(forged, root);
        VM.warp(block.timestamp + CHALLENGE);
        expectClaim(
            abi.encodeWithSelector(InferaSettlement.NoSuchRoot.selector, forged), forged, STRANGER, 900_000, stolen
        );
        eq(settlement.rewards(forged + 1).root, bytes32(0), "the one after it");
        settlement.claim(good, CARA, 300, proofOf(tree, 0));
        // The queue goes on where it was: same id, and the total of the last honest root.
        (uint64 next,) = queueTwo(300, 201);
        eq(next, forged, "id");
    }

    function testAVetoComesInTimeFromTheGuardianOrNotAtAll() public {
        (uint64 id, bytes32[] memory tree) = queueTwo(300, 200);
        bytes32 role = settlement.GUARDIAN_ROLE();
        VM.prank(SETTLER);
        VM.expectRevert(abi.encodeWithSelector(IAccessControl.AccessControlUnauthorizedAccount.selector, SETTLER, role));
        settlement.veto(id, tree[0]);
        VM.warp(block.timestamp + CHALLENGE);
        VM.prank(GUARDIAN);
        VM.expectRevert(abi.encodeWithSelector(InferaSettlement.AlreadyClaimable.selector, id));
        settlement.veto(id, tree[0]);
        VM.prank(GUARDIAN);
        VM.expectRevert(abi.encodeWithSelector(InferaSettlement.NoSuchRoot.selector, 0));
        settlement.veto(0, bytes32(0));
    }

    function testTheTotalIsNeverMoreThanThePool(uint128 total) public {
        InferaSettlement.Batch memory batch = post(keccak256("rewards"));
        total = uint128(bound(total, 1_000_001, type(uint128).max));
        VM.prank(SETTLER);
        VM.expectRevert(abi.encodeWithSelector(InferaSettlement.Insolvent.selector, 1_000_000, total));
        settlement.queueRewards(batch, total);
        VM.prank(SETTLER);
        settlement.queueRewards(batch, 1_000_000);
        batch = post(keccak256("fewer"));
        VM.prank(SETTLER);
        VM.expectRevert(abi.encodeWithSelector(InferaSettlement.TotalDecreases.selector, 1_000_000, 999_999));
        settlement.queueRewards(batch, 999_999);
    }

    /// A tree that holds more than it was declared to: who claims last gets no money of others.
    function testClaimsStopAtTheDeclaredTotal() public {
        depositFor(alice, 500);
        (address[] memory operators, uint256[] memory amounts) = two(300, 2_000_000);
        (uint64 id, bytes32[] memory tree) = queue(operators, amounts, 700);
        VM.warp(block.timestamp + CHALLENGE);
        settlement.claim(id, CARA, 300, proofOf(tree, 0));
        bytes memory beyond = abi.encodeWithSelector(InferaSettlement.BeyondTotal.selector, 700, 2_000_300);
        expectClaim(beyond, id, DAN, 2_000_000, proofOf(tree, 1));
        eq(settlement.account(alice).escrow, 500, "escrow");
    }

    function testOnlyTheNewestBatchesOwnRootIsQueuedAndOnce() public {
        InferaSettlement.Batch memory batch = post(keccak256("rewards"));
        bytes32 headHash = settlement.hashBatch(1, bytes32(0), batch.receiptsRoot, 10, batch.rewardRoot, 9);
        batch.rewardRoot = keccak256("another");
        bytes32 forged = settlement.hashBatch(1, bytes32(0), batch.receiptsRoot, 10, batch.rewardRoot, 9);
        VM.prank(SETTLER);
        VM.expectRevert(abi.encodeWithSelector(InferaSettlement.NotTheHead.selector, headHash, forged));
        settlement.queueRewards(batch, 1);
        batch.rewardRoot = keccak256("rewards");
        bytes32 role = settlement.SETTLER_ROLE();
        VM.prank(STRANGER);
        VM.expectRevert(
            abi.encodeWithSelector(IAccessControl.AccessControlUnauthorizedAccount.selector, STRANGER, role)
        );
        settlement.queueRewards(batch, 1);
        VM.prank(SETTLER);
        settlement.queueRewards(batch, 1);
        VM.prank(SETTLER);
        VM.expectRevert(abi.encodeWithSelector(InferaSettlement.AlreadyQueued.selector, 1));
        settlement.queueRewards(batch, 2);
        batch = post(bytes32(0));
        VM.prank(SETTLER);
        VM.expectRevert(InferaSettlement.NoRewards.selector);
        settlement.queueRewards(batch, 2);
    }

    /// Neither the settler nor a pause nor the loss of its role stops money that is due.
    function testNobodyFreezesAClaim() public {
        (uint64 id, bytes32[] memory tree) = queueTwo(300, 200);
        VM.warp(block.timestamp + CHALLENGE);
        VM.prank(GUARDIAN);
        settlement.pause();
        settlement.claim(id, CARA, 300, proofOf(tree, 0));
        bytes32 role = settlement.SETTLER_ROLE();
        VM.prank(address(timelock));
        settlement.revokeRole(role, SETTLER);
        settlement.claim(id, DAN, 200, proofOf(tree, 1));
        VM.prank(SETTLER);
        VM.expectRevert();
        settlement.pause();
        VM.prank(DEPLOYER);
        VM.expectRevert(Pausable.EnforcedPause.selector);
        settlement.fund(1);
    }

    function testEverybodyOfAnyTreeClaimsExactlyItsOwn(uint64 seed, uint8 size) public {
        uint256 count = bound(size, 1, 40);
        (address[] memory operators, uint256[] memory amounts) = (new address[](count), new uint256[](count));
        uint256 sum = 0;
        for (uint256 i = 0; i < count; i++) {
            operators[i] = address(uint160(0x1000 + i));
            amounts[i] = uint256(keccak256(abi.encode(seed, i))) % 10_000 + 1;
            sum += amounts[i];
        }
        (uint64 id, bytes32[] memory tree) = queue(operators, amounts, sum);
        VM.warp(block.timestamp + CHALLENGE);
        for (uint256 i = 0; i < count; i++) {
            settlement.claim(id, operators[i], amounts[i], proofOf(tree, i));
            eq(token.balanceOf(operators[i]), amounts[i], "paid");
        }
        eq(settlement.totalClaimed(), sum, "sum");
        eq(token.balanceOf(address(settlement)), owed(), "balance");
    }

    /// The leaf and the voucher as Rust computes them: `domain::reward_root` of the settlement service and
    /// `voucher_digest` of the protocol have the same golden values in their tests.
    function testLeafAndVoucherAreRusts() public pure {
        address who = address(0x1111111111111111111111111111111111111111);
        bytes32 leaf = 0xec641c307c1c3ad464b1a6c2cab6e110654a6a6f5961f3473a54a0fb4380238c;
        eq(rewardLeaf(who, 1_234_567), leaf, "leaf");
        bytes32 message =
            keccak256(abi.encode(keccak256("Voucher(address account,uint256 cumulative)"), who, 1_234_567));
        bytes32 golden = 0x65f8834fc15ce2e0c4953dab67bc894146fdf6efeefc5eb036fd8351e3d6c18f;
        eq(digest(CHAIN, address(0x0909090909090909090909090909090909090909), message), golden, "voucher");
    }
}
