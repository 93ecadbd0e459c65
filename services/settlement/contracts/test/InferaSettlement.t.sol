// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IAccessControl} from "@openzeppelin/contracts/access/IAccessControl.sol";
import {Hashes} from "@openzeppelin/contracts/utils/cryptography/Hashes.sol";
import {InferaSettlement} from "../src/InferaSettlement.sol";

/// The cheat codes used here (forge-std is not needed for these).
interface Vm {
    function prank(address sender) external;
    function expectRevert(bytes calldata data) external;
    function expectEmit(bool topic1, bool topic2, bool topic3, bool data) external;
    function assume(bool condition) external;
}

contract InferaSettlementTest {
    Vm private constant VM = Vm(0x7109709ECfa91a80626fF3989D68f67F5b1DD12D);
    address private constant ADMIN = address(0xA);
    address private constant SETTLER = address(0x5);
    InferaSettlement private settlement;

    function setUp() public {
        settlement = new InferaSettlement(ADMIN, SETTLER);
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
        VM.prank(ADMIN);
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
        bytes32[] memory tree = build(seed, count);
        post(1, bytes32(0), tree[0], uint64(count));
        for (uint256 i = 0; i < count; i++) {
            uint256 at = tree.length - 1 - i;
            assert(settlement.verifyReceipt(1, tree[at], proofOf(tree, at)));
            assert(!settlement.verifyReceipt(2, tree[at], proofOf(tree, at)));
        }
    }

    function testRefusesAForgedReceipt(bytes32 seed, uint8 size, uint8 which, uint256 bit, bytes32 stranger) public {
        uint256 count = uint256(size) % 32 + 2;
        bytes32[] memory tree = build(seed, count);
        post(1, bytes32(0), tree[0], uint64(count));
        uint256 at = tree.length - 1 - (uint256(which) % count);
        bytes32[] memory proof = proofOf(tree, at);
        VM.assume(stranger != tree[at]);
        assert(!settlement.verifyReceipt(1, stranger, proof));
        proof[bit % proof.length] ^= bytes32(uint256(1) << (bit % 256));
        assert(!settlement.verifyReceipt(1, tree[at], proof));
    }

    /// OpenZeppelin's standard tree: leaves in reverse at the end of a complete binary tree (sorted in the library; the
    /// order does not matter for proofs).
    function build(bytes32 seed, uint256 count) private pure returns (bytes32[] memory tree) {
        tree = new bytes32[](2 * count - 1);
        for (uint256 i = 0; i < count; i++) {
            tree[tree.length - 1 - i] = keccak256(abi.encode(keccak256(abi.encode(seed, i))));
        }
        for (uint256 i = tree.length - count; i > 0; i--) {
            tree[i - 1] = Hashes.commutativeKeccak256(tree[2 * i - 1], tree[2 * i]);
        }
    }

    function proofOf(bytes32[] memory tree, uint256 at) private pure returns (bytes32[] memory proof) {
        uint256 depth = 0;
        for (uint256 i = at; i > 0; i = (i - 1) / 2) depth++;
        proof = new bytes32[](depth);
        uint256 step = 0;
        for (uint256 i = at; i > 0; i = (i - 1) / 2) proof[step++] = tree[i % 2 == 1 ? i + 1 : i - 1];
    }
}
