// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {AccessControl} from "@openzeppelin/contracts/access/AccessControl.sol";
import {MerkleProof} from "@openzeppelin/contracts/utils/cryptography/MerkleProof.sol";

/// @title The anchor of the network's receipts.
/// @notice A settler posts batches of receipts as Merkle roots. The batches are a hash chain: none can be skipped,
/// rewritten or posted twice, so a settler that restarts goes on from `head()`.
/// @dev Only the root of a batch is kept in storage (one slot a batch). Its count, reward root and total are in the
/// event `BatchPosted` and are committed to by the hash chain.
contract InferaSettlement is AccessControl {
    /// @notice May post batches.
    bytes32 public constant SETTLER_ROLE = keccak256("SETTLER_ROLE");

    /// @notice A batch was posted.
    /// @param sequence position in the chain of batches, from 1
    /// @param batchHash `hashBatch` of the other values: what the next batch must name as its predecessor
    /// @param previousHash the hash of batch `sequence - 1`, zero for the first
    /// @param receiptsRoot root of OpenZeppelin's standard Merkle tree over the batch's receipts
    /// @param count receipts in the batch
    /// @param rewardRoot root over operators' cumulative rewards
    /// @param total what the batch's receipts charged together, in 10^-6 INFER
    event BatchPosted(
        uint64 indexed sequence,
        bytes32 indexed batchHash,
        bytes32 previousHash,
        bytes32 indexed receiptsRoot,
        uint64 count,
        bytes32 rewardRoot,
        uint128 total
    );

    /// @notice The batch is not the next one.
    error WrongSequence(uint64 expected, uint64 given);
    /// @notice The batch does not follow the head.
    error WrongPreviousHash(bytes32 expected, bytes32 given);
    /// @notice A batch holds at least one receipt and has a root.
    error EmptyBatch();

    uint64 private _headSequence;
    bytes32 private _headHash;
    mapping(uint64 sequence => bytes32 receiptsRoot) private _roots;

    /// @param admin may grant and revoke roles
    /// @param settler may post batches
    constructor(address admin, address settler) {
        _grantRole(DEFAULT_ADMIN_ROLE, admin);
        _grantRole(SETTLER_ROLE, settler);
    }

    /// @notice Posts the next batch.
    function postBatch(
        uint64 sequence,
        bytes32 previousHash,
        bytes32 receiptsRoot,
        uint64 count,
        bytes32 rewardRoot,
        uint128 total
    ) external onlyRole(SETTLER_ROLE) {
        uint64 next = _headSequence + 1;
        if (sequence != next) revert WrongSequence(next, sequence);
        bytes32 headHash = _headHash;
        if (previousHash != headHash) revert WrongPreviousHash(headHash, previousHash);
        if (count == 0 || receiptsRoot == bytes32(0)) revert EmptyBatch();

        bytes32 batchHash = hashBatch(sequence, previousHash, receiptsRoot, count, rewardRoot, total);
        _headSequence = sequence;
        _headHash = batchHash;
        _roots[sequence] = receiptsRoot;
        emit BatchPosted(sequence, batchHash, previousHash, receiptsRoot, count, rewardRoot, total);
    }

    /// @notice The newest batch; (0, 0) before the first.
    function head() external view returns (uint64 sequence, bytes32 batchHash) {
        return (_headSequence, _headHash);
    }

    /// @notice The receipts root of a batch; zero if there is no such batch.
    function batches(uint64 sequence) external view returns (bytes32 receiptsRoot) {
        return _roots[sequence];
    }

    /// @notice Whether `leaf` is in batch `sequence`.
    /// @param leaf double keccak of the receipt's ABI-encoded fields. Compute it from the fields: an inner node of the
    /// tree passes too, and only the double hash of real fields tells the two apart.
    function verifyReceipt(uint64 sequence, bytes32 leaf, bytes32[] calldata proof) external view returns (bool) {
        bytes32 root = _roots[sequence];
        return root != bytes32(0) && MerkleProof.verifyCalldata(proof, root, leaf);
    }

    /// @notice The hash by which the next batch names this one.
    function hashBatch(
        uint64 sequence,
        bytes32 previousHash,
        bytes32 receiptsRoot,
        uint64 count,
        bytes32 rewardRoot,
        uint128 total
    ) public pure returns (bytes32) {
        return keccak256(abi.encode(sequence, previousHash, receiptsRoot, count, rewardRoot, total));
    }
}
