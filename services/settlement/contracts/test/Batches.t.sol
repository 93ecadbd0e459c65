// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IAccessControl} from "@openzeppelin/contracts/access/IAccessControl.sol";
import {Pausable} from "@openzeppelin/contracts/utils/Pausable.sol";
import {Network} from "./Base.sol";
import {InferaSettlement} from "../src/InferaSettlement.sol";

/// The chain of batches and the proofs of receipts.
contract BatchesTest is Network {
    function setUp() public {
        deploy();
    }

    function post(uint64 sequence, bytes32 previous, bytes32 root, uint64 count) private {
        VM.prank(SETTLER);
        settlement.postBatch(sequence, previous, root, count, bytes32(uint256(7)), 9);
    }

    function headHash() private view returns (bytes32 hash) {
        (, hash) = settlement.head();
    }

    function testHeadStartsAtZero() public view {
        (uint64 sequence, bytes32 hash) = settlement.head();
        assert(sequence == 0 && hash == bytes32(0));
        assert(settlement.batches(0) == bytes32(0) && settlement.batches(1) == bytes32(0));
    }

    function testPostMovesHeadAndEmits() public {
        bytes32 root = keccak256("root");
        bytes32 expected = settlement.hashBatch(1, bytes32(0), root, 3, bytes32(uint256(7)), 9);
        VM.expectEmit(true, true, true, true);
        emit InferaSettlement.BatchPosted(1, expected, bytes32(0), root, 3, bytes32(uint256(7)), 9);
        post(1, bytes32(0), root, 3);
        (uint64 sequence, bytes32 hash) = settlement.head();
        assert(sequence == 1 && hash == expected && settlement.batches(1) == root);
        assert(hash == keccak256(abi.encode(uint64(1), bytes32(0), root, uint64(3), bytes32(uint256(7)), uint128(9))));
    }

    function testOnlyTheSettlerPosts(address stranger) public {
        VM.assume(stranger != SETTLER);
        bytes32 role = settlement.SETTLER_ROLE();
        VM.prank(stranger);
        VM.expectRevert(
            abi.encodeWithSelector(IAccessControl.AccessControlUnauthorizedAccount.selector, stranger, role)
        );
        settlement.postBatch(1, bytes32(0), keccak256("root"), 1, bytes32(0), 0);
    }

    function testARevokedSettlerCannotPost() public {
        bytes32 role = settlement.SETTLER_ROLE();
        VM.prank(address(timelock));
        settlement.revokeRole(role, SETTLER);
        VM.prank(SETTLER);
        VM.expectRevert(abi.encodeWithSelector(IAccessControl.AccessControlUnauthorizedAccount.selector, SETTLER, role));
        settlement.postBatch(1, bytes32(0), keccak256("root"), 1, bytes32(0), 0);
    }

    function testNeitherSkipsNorRewritesNorRepeats(uint64 sequence) public {
        post(1, bytes32(0), keccak256("one"), 1);
        post(2, headHash(), keccak256("two"), 1);
        VM.assume(sequence != 3);
        bytes32 previous = headHash();
        VM.prank(SETTLER);
        VM.expectRevert(abi.encodeWithSelector(InferaSettlement.WrongSequence.selector, uint64(3), sequence));
        settlement.postBatch(sequence, previous, keccak256("x"), 1, bytes32(0), 0);
        assert(settlement.batches(1) == keccak256("one") && settlement.batches(2) == keccak256("two"));
    }

    function testMustFollowTheHead(bytes32 previous) public {
        post(1, bytes32(0), keccak256("one"), 1);
        bytes32 expected = headHash();
        VM.assume(previous != expected);
        VM.prank(SETTLER);
        VM.expectRevert(abi.encodeWithSelector(InferaSettlement.WrongPreviousHash.selector, expected, previous));
        settlement.postBatch(2, previous, keccak256("two"), 1, bytes32(0), 0);
    }

    function testRefusesAnEmptyBatch() public {
        VM.prank(SETTLER);
        VM.expectRevert(abi.encodeWithSelector(InferaSettlement.EmptyBatch.selector));
        settlement.postBatch(1, bytes32(0), keccak256("root"), 0, bytes32(0), 0);
        VM.prank(SETTLER);
        VM.expectRevert(abi.encodeWithSelector(InferaSettlement.EmptyBatch.selector));
        settlement.postBatch(1, bytes32(0), bytes32(0), 1, bytes32(0), 0);
    }

    function testTheHashCoversEveryField(uint8 field, uint64 salt) public {
        VM.assume(salt != 0);
        bytes32 plain = settlement.hashBatch(1, bytes32(0), bytes32(0), 1, bytes32(0), 0);
        uint256 which = field % 6;
        bytes32 changed = settlement.hashBatch(
            which == 0 ? 1 ^ salt : 1,
            which == 1 ? bytes32(uint256(salt)) : bytes32(0),
            which == 2 ? bytes32(uint256(salt)) : bytes32(0),
            which == 3 ? 1 ^ salt : 1,
            which == 4 ? bytes32(uint256(salt)) : bytes32(0),
            which == 5 ? salt : 0
        );
        assert(plain != changed);
    }

    function testVerifiesEveryReceiptOfABatch(bytes32 seed, uint8 size) public {
        uint256 count = uint256(size) % 33 + 1;
        bytes32[] memory receipts = leaves(seed, count);
        bytes32[] memory tree = treeOf(receipts);
        post(1, bytes32(0), tree[0], uint64(count));
        for (uint256 i = 0; i < count; i++) {
            assert(settlement.verifyReceipt(1, receipts[i], proofOf(tree, i)));
            assert(!settlement.verifyReceipt(2, receipts[i], proofOf(tree, i)));
        }
    }

    function testRefusesAForgedReceipt(bytes32 seed, uint8 size, uint8 which, uint256 bit, bytes32 stranger) public {
        uint256 count = uint256(size) % 32 + 2;
        bytes32[] memory receipts = leaves(seed, count);
        bytes32[] memory tree = treeOf(receipts);
        post(1, bytes32(0), tree[0], uint64(count));
        uint256 leaf = uint256(which) % count;
        bytes32[] memory proof = proofOf(tree, leaf);
        VM.assume(stranger != receipts[leaf]);
        assert(!settlement.verifyReceipt(1, stranger, proof));
        proof[bit % proof.length] ^= bytes32(uint256(1) << (bit % 256));
        assert(!settlement.verifyReceipt(1, receipts[leaf], proof));
    }

    function testAPausePostsNothing() public {
        VM.prank(GUARDIAN);
        settlement.pause();
        VM.prank(SETTLER);
        VM.expectRevert(Pausable.EnforcedPause.selector);
        settlement.postBatch(1, bytes32(0), keccak256("root"), 1, bytes32(0), 0);
        VM.prank(GUARDIAN);
        settlement.unpause();
        post(1, bytes32(0), keccak256("root"), 1);
    }

    /// One transaction posts, charges and queues: all of it or nothing.
    function testOneTransactionDoesAllOrNothing() public {
        depositFor(alice, 100);
        bytes32[] memory proof = new bytes32[](0);
        bytes32 rewardRoot = rewardLeaf(bob, 60);
        InferaSettlement.Batch memory batch =
            InferaSettlement.Batch(1, bytes32(0), keccak256("root"), 1, rewardRoot, 60);
        bytes[] memory calls = new bytes[](3);
        calls[0] = abi.encodeCall(settlement.postBatch, (1, bytes32(0), batch.receiptsRoot, 1, rewardRoot, 60));
        calls[1] = abi.encodeCall(settlement.charge, (1, one(alice, 60, 60, voucher(ALICE_KEY, 60))));
        calls[2] = abi.encodeCall(settlement.queueRewards, (batch, 61));
        VM.prank(SETTLER);
        VM.expectRevert(abi.encodeWithSelector(InferaSettlement.Insolvent.selector, 60, 61));
        settlement.multicall(calls);
        assert(headHash() == bytes32(0) && settlement.totalFunded() == 0);

        calls[2] = abi.encodeCall(settlement.queueRewards, (batch, 60));
        VM.prank(STRANGER);
        VM.expectRevert();
        settlement.multicall(calls);
        VM.prank(SETTLER);
        settlement.multicall(calls);
        VM.warp(START + CHALLENGE);
        settlement.claim(1, bob, 60, proof);
        eq(token.balanceOf(bob), 60, "paid");
    }

    function leaves(bytes32 seed, uint256 count) private pure returns (bytes32[] memory hashes) {
        hashes = new bytes32[](count);
        for (uint256 i = 0; i < count; i++) {
            hashes[i] = keccak256(abi.encode(keccak256(abi.encode(seed, i))));
        }
    }
}
