// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {AccessControl} from "@openzeppelin/contracts/access/AccessControl.sol";
import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {IERC20Permit} from "@openzeppelin/contracts/token/ERC20/extensions/IERC20Permit.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {EIP712} from "@openzeppelin/contracts/utils/cryptography/EIP712.sol";
import {MerkleProof} from "@openzeppelin/contracts/utils/cryptography/MerkleProof.sol";
import {Math} from "@openzeppelin/contracts/utils/math/Math.sol";
import {SafeCast} from "@openzeppelin/contracts/utils/math/SafeCast.sol";
import {Multicall} from "@openzeppelin/contracts/utils/Multicall.sol";
import {Pausable} from "@openzeppelin/contracts/utils/Pausable.sol";
import {ReentrancyGuardTransient} from "@openzeppelin/contracts/utils/ReentrancyGuardTransient.sol";

/// @title The network's money and the anchor of its receipts.
/// @notice Three things, in one place so that one invariant covers them:
/// - **Batches.** A settler posts receipts as Merkle roots. The batches are a hash chain: none can be skipped, rewritten
///   or posted twice, so a settler that restarts goes on from `head()`.
/// - **Escrow.** Consumers deposit; the settler charges them up to what they signed (a cumulative voucher) and never
///   more than their escrow. What is charged goes into the pool, never to the settler.
/// - **Rewards.** A queue of Merkle roots over the operators' cumulative rewards. Each waits for its own challenge
///   delay, in which the guardian may veto it; meanwhile operators claim by the ones before. Claims come out of the pool.
///
/// The token balance of this contract is always at least `totalEscrow + totalFunded - totalClaimed`.
/// @dev Not upgradeable, delays are immutable, the token cannot be exchanged. The admin is meant to be the timelock; all
/// it can do is to name settlers and guardians. Nobody can pause withdrawals or claims.
contract InferaSettlement is AccessControl, EIP712, Multicall, ReentrancyGuardTransient, Pausable {
    using SafeERC20 for IERC20;
    using SafeCast for uint256;

    /// @notice May post batches, charge, and queue reward roots.
    bytes32 public constant SETTLER_ROLE = keccak256("SETTLER_ROLE");
    /// @notice May veto reward roots that are not yet claimable, and pause what brings new money or new roots in.
    bytes32 public constant GUARDIAN_ROLE = keccak256("GUARDIAN_ROLE");
    /// @notice EIP-712 type of what a consumer signs: the most that may ever be charged to `account`, over its lifetime.
    bytes32 public constant VOUCHER_TYPEHASH = keccak256("Voucher(address account,uint256 cumulative)");
    /// @notice The longest delay that this contract can be made with: nobody's money is out of reach for longer.
    uint256 public constant MAX_DELAY = 30 days;
    /// @notice Most reward roots that wait at a time, so that a veto of all of them fits into one transaction.
    uint64 public constant MAX_PENDING = 128;

    /// @notice What everything is counted in.
    IERC20 public immutable TOKEN;
    /// @notice Seconds between the queueing of a reward root and the first claim by it.
    uint256 public immutable CHALLENGE_DELAY;
    /// @notice Seconds between a consumer's request for a withdrawal and the withdrawal: the time in which the settler
    /// charges what was used.
    uint256 public immutable WITHDRAWAL_DELAY;

    /// @notice A batch of receipts.
    struct Batch {
        uint64 sequence;
        bytes32 previousHash;
        bytes32 receiptsRoot;
        uint64 count;
        bytes32 rewardRoot;
        uint128 total;
    }

    /// @notice A consumer's money here, 10^-6 INFER.
    struct Account {
        /// Deposited and neither charged nor withdrawn.
        uint128 escrow;
        /// Charged so far, over the account's lifetime.
        uint128 charged;
        /// The highest voucher seen: `charged` never exceeds it.
        uint128 authorized;
        /// Asked to be withdrawn.
        uint128 withdrawal;
        /// When `withdrawal` may be taken, seconds since 1970.
        uint64 withdrawableAt;
    }

    /// @notice One account's part of a charge.
    struct Charge {
        address account;
        /// What the account has to have paid over its lifetime.
        uint128 cumulative;
        /// A voucher for at least that; not read where an earlier one suffices.
        uint128 voucher;
        /// The account's signature of the voucher, r, s, v; may be empty where an earlier one suffices.
        bytes signature;
    }

    /// @notice A reward root in the queue.
    struct RewardRoot {
        /// OpenZeppelin's standard Merkle tree over `(address operator, uint256 cumulative)`.
        bytes32 root;
        /// The sum of the tree's leaves, as the settler declared it: claims by this root stop there.
        uint128 total;
        /// The batch that the root stands in.
        uint64 sequence;
        /// From when on it pays, seconds since 1970.
        uint64 maturesAt;
    }

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
    /// @notice `amount` came into `account`'s escrow.
    event Deposited(address indexed account, address indexed from, uint256 amount);
    /// @notice `account` wants `amount` back; it may take it from `withdrawableAt` on. Replaces an earlier request.
    event WithdrawalRequested(address indexed account, uint256 amount, uint64 withdrawableAt);
    /// @notice `account` does not want its withdrawal any more.
    event WithdrawalCancelled(address indexed account);
    /// @notice `amount` left `account`'s escrow; less than requested if the rest was charged meanwhile.
    event Withdrawn(address indexed account, uint256 amount);
    /// @notice `account` now allows `cumulative` in all.
    event VoucherRecorded(address indexed account, uint256 cumulative);
    /// @notice `amount` went from `account`'s escrow into the pool, `charged` in all so far.
    event Charged(uint64 indexed sequence, address indexed account, uint256 amount, uint256 charged);
    /// @notice The escrow of `account` was too small for what it owes: `missing` can be charged when it has deposited.
    event ChargedShort(uint64 indexed sequence, address indexed account, uint256 missing);
    /// @notice `from` put `amount` into the pool (prepaid credit, referees, audits).
    event Funded(address indexed from, uint256 amount);
    /// @notice A reward root began its challenge delay.
    event RewardRootQueued(
        uint64 indexed id, bytes32 indexed root, uint128 total, uint64 indexed sequence, uint64 maturesAt
    );
    /// @notice A reward root was vetoed. Its id is free again.
    event RewardRootVetoed(uint64 indexed id, bytes32 indexed root, address indexed guardian);
    /// @notice `operator` was paid `amount`, `cumulative` in all so far.
    event Claimed(address indexed operator, uint64 indexed id, uint256 amount, uint256 cumulative);

    /// @notice The batch is not the next one (or, in a charge, not the newest one).
    error WrongSequence(uint64 expected, uint64 given);
    /// @notice The batch does not follow the head.
    error WrongPreviousHash(bytes32 expected, bytes32 given);
    /// @notice A batch holds at least one receipt and has a root.
    error EmptyBatch();
    /// @notice A constructor argument that cannot work.
    error BadArgument();
    /// @notice An amount must be more than zero.
    error ZeroAmount();
    /// @notice The token moved another amount than it was told to.
    error WrongAmountReceived(uint256 expected, uint256 received);
    /// @notice More than the account's escrow.
    error BeyondEscrow(uint256 escrow, uint256 requested);
    /// @notice There is no withdrawal to take or to cancel.
    error NoWithdrawal();
    /// @notice Too early.
    error NotBefore(uint64 time);
    /// @notice The signature is not the account's for this voucher, on this chain and this contract.
    error BadVoucher(address account);
    /// @notice More than the account allowed.
    error BeyondVoucher(address account, uint256 authorized, uint256 requested);
    /// @notice Not the fields of the newest batch.
    error NotTheHead(bytes32 expected, bytes32 given);
    /// @notice The batch has no rewards.
    error NoRewards();
    /// @notice Only batches after the last queued root's can bring a new one.
    error AlreadyQueued(uint64 sequence);
    /// @notice Cumulative rewards never shrink.
    error TotalDecreases(uint256 previous, uint256 given);
    /// @notice More rewards than were charged and funded.
    error Insolvent(uint256 funded, uint256 given);
    /// @notice `MAX_PENDING` roots wait; the oldest of them pays from `until` on.
    error QueueFull(uint64 until);
    /// @notice There is no such reward root.
    error NoSuchRoot(uint64 id);
    /// @notice The root pays already: too late for a veto.
    error AlreadyClaimable(uint64 id);
    /// @notice The proof does not lead from this operator and amount to the root.
    error BadProof();
    /// @notice The operator was paid this much already.
    error NothingToClaim(uint256 claimed);
    /// @notice The root's leaves are more than its declared total.
    error BeyondTotal(uint256 total, uint256 claimed);

    // Shares a slot with Pausable's flag.
    uint64 private _headSequence;
    uint64 private _lastRewardId;
    bytes32 private _headHash;
    mapping(uint64 sequence => bytes32 receiptsRoot) private _roots;
    mapping(address consumer => Account) private _accounts;
    mapping(uint64 id => RewardRoot) private _rewardRoots;
    mapping(address operator => uint256 amount) private _claimed;

    /// @notice The sum of all escrows.
    uint128 public totalEscrow;
    /// @notice What was ever charged and funded: the pool before claims. Never shrinks.
    uint128 public totalFunded;
    /// @notice What was ever claimed out of the pool.
    uint128 public totalClaimed;

    /// @param token what everything is counted in: moves exactly what it is told to
    /// @param admin names settlers and guardians (the timelock)
    /// @param settler may post batches
    /// @param guardian may veto and pause; zero for none yet
    /// @param challengeDelay seconds, at most `MAX_DELAY`
    /// @param withdrawalDelay seconds, at most `MAX_DELAY`
    constructor(
        IERC20 token,
        address admin,
        address settler,
        address guardian,
        uint256 challengeDelay,
        uint256 withdrawalDelay
    ) EIP712("Infera", "1") {
        if (address(token).code.length == 0 || admin == address(0)) revert BadArgument();
        if (challengeDelay > MAX_DELAY || withdrawalDelay > MAX_DELAY) revert BadArgument();
        TOKEN = token;
        CHALLENGE_DELAY = challengeDelay;
        WITHDRAWAL_DELAY = withdrawalDelay;
        _grantRole(DEFAULT_ADMIN_ROLE, admin);
        _grantRole(SETTLER_ROLE, settler);
        if (guardian != address(0)) _grantRole(GUARDIAN_ROLE, guardian);
    }

    // ---- batches ----

    /// @notice Posts the next batch.
    function postBatch(
        uint64 sequence,
        bytes32 previousHash,
        bytes32 receiptsRoot,
        uint64 count,
        bytes32 rewardRoot,
        uint128 total
    ) external onlyRole(SETTLER_ROLE) whenNotPaused {
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

    // ---- escrow ----

    /// @notice A consumer's money here.
    function account(address consumer) external view returns (Account memory) {
        return _accounts[consumer];
    }

    /// @notice Moves `amount` from the caller into `consumer`'s escrow.
    function deposit(address consumer, uint256 amount) external nonReentrant whenNotPaused {
        _deposit(consumer, amount);
    }

    /// @notice The same with the caller's ERC-2612 permit, in one transaction.
    /// @dev A permit that somebody else sent first has done its work: its failure is not looked at, the transfer decides.
    function depositWithPermit(address consumer, uint256 amount, uint256 deadline, uint8 v, bytes32 r, bytes32 s)
        external
        nonReentrant
        whenNotPaused
    {
        try IERC20Permit(address(TOKEN)).permit(msg.sender, address(this), amount, deadline, v, r, s) {} catch {}
        _deposit(consumer, amount);
    }

    function _deposit(address consumer, uint256 amount) private {
        uint128 received = _pull(amount);
        _accounts[consumer].escrow += received;
        totalEscrow += received;
        emit Deposited(consumer, msg.sender, received);
    }

    /// @notice Announces that the caller wants `amount` of its escrow back. A second request replaces the first and
    /// starts the delay anew. What is announced is no longer good for new requests, but what was used before the delay
    /// has passed can still be charged to it.
    function requestWithdrawal(uint256 amount) external {
        if (amount == 0) revert ZeroAmount();
        Account storage consumer = _accounts[msg.sender];
        if (amount > consumer.escrow) revert BeyondEscrow(consumer.escrow, amount);
        uint64 withdrawableAt = (block.timestamp + WITHDRAWAL_DELAY).toUint64();
        consumer.withdrawal = amount.toUint128();
        consumer.withdrawableAt = withdrawableAt;
        emit WithdrawalRequested(msg.sender, amount, withdrawableAt);
    }

    /// @notice Takes the caller's request back.
    function cancelWithdrawal() external {
        Account storage consumer = _accounts[msg.sender];
        if (consumer.withdrawal == 0) revert NoWithdrawal();
        consumer.withdrawal = 0;
        consumer.withdrawableAt = 0;
        emit WithdrawalCancelled(msg.sender);
    }

    /// @notice Pays the caller what it requested, as far as its escrow still has it. Nobody can stop this.
    function withdraw() external nonReentrant returns (uint256 amount) {
        Account storage consumer = _accounts[msg.sender];
        if (consumer.withdrawal == 0) revert NoWithdrawal();
        if (block.timestamp < consumer.withdrawableAt) revert NotBefore(consumer.withdrawableAt);
        uint128 paid = uint128(Math.min(consumer.withdrawal, consumer.escrow));
        consumer.withdrawal = 0;
        consumer.withdrawableAt = 0;
        consumer.escrow -= paid;
        totalEscrow -= paid;
        emit Withdrawn(msg.sender, paid);
        if (paid != 0) TOKEN.safeTransfer(msg.sender, paid);
        return paid;
    }

    /// @notice Charges accounts for the newest batch (call it again where one transaction is too small for all). Totals
    /// are cumulative: the same charge again does nothing.
    /// @dev An account that allowed too little fails the whole call, because a voucher never becomes smaller and the
    /// settler knew it. An account that has too little does not, because it could withdraw just before: it pays what it
    /// has, and the rest is still owed.
    function charge(uint64 sequence, Charge[] calldata charges) external onlyRole(SETTLER_ROLE) whenNotPaused {
        if (sequence == 0 || sequence != _headSequence) revert WrongSequence(_headSequence, sequence);
        uint128 taken = 0;
        for (uint256 i = 0; i < charges.length; i++) {
            taken += _charge(sequence, charges[i]);
        }
        totalEscrow -= taken;
        totalFunded += taken;
    }

    function _charge(uint64 sequence, Charge calldata one) private returns (uint128 amount) {
        Account storage consumer = _accounts[one.account];
        uint128 charged = consumer.charged;
        if (one.cumulative <= charged) return 0;
        uint128 authorized = consumer.authorized;
        if (one.cumulative > authorized && one.voucher > authorized) {
            _checkVoucher(one.account, one.voucher, one.signature);
            authorized = one.voucher;
            consumer.authorized = authorized;
            emit VoucherRecorded(one.account, authorized);
        }
        if (one.cumulative > authorized) revert BeyondVoucher(one.account, authorized, one.cumulative);

        uint128 due = one.cumulative - charged;
        uint128 escrow = consumer.escrow;
        amount = due < escrow ? due : escrow;
        if (amount != 0) {
            consumer.escrow = escrow - amount;
            consumer.charged = charged + amount;
            emit Charged(sequence, one.account, amount, charged + amount);
        }
        if (amount != due) emit ChargedShort(sequence, one.account, due - amount);
    }

    function _checkVoucher(address signer, uint256 cumulative, bytes calldata signature) private view {
        bytes32 digest = _hashTypedDataV4(keccak256(abi.encode(VOUCHER_TYPEHASH, signer, cumulative)));
        (address recovered, ECDSA.RecoverError failure,) = ECDSA.tryRecoverCalldata(digest, signature);
        if (failure != ECDSA.RecoverError.NoError || recovered != signer) revert BadVoucher(signer);
    }

    // ---- rewards ----

    /// @notice Moves `amount` from the caller into the pool, out of which rewards are claimed.
    function fund(uint256 amount) external nonReentrant whenNotPaused {
        uint128 received = _pull(amount);
        totalFunded += received;
        emit Funded(msg.sender, received);
    }

    /// @notice Queues the reward root of the newest batch. It pays after the challenge delay; the roots before it go on
    /// paying meanwhile.
    /// @param batch the newest batch's fields: the root is one that the hash chain commits to
    /// @param total the sum of all cumulative rewards in the tree: never less than before, never more than the pool
    function queueRewards(Batch calldata batch, uint128 total) external onlyRole(SETTLER_ROLE) whenNotPaused {
        bytes32 batchHash = hashBatch(
            batch.sequence, batch.previousHash, batch.receiptsRoot, batch.count, batch.rewardRoot, batch.total
        );
        if (batchHash != _headHash) revert NotTheHead(_headHash, batchHash);
        if (batch.rewardRoot == bytes32(0)) revert NoRewards();
        uint64 id = _lastRewardId;
        RewardRoot storage last = _rewardRoots[id];
        if (batch.sequence <= last.sequence) revert AlreadyQueued(last.sequence);
        if (total < last.total) revert TotalDecreases(last.total, total);
        if (total > totalFunded) revert Insolvent(totalFunded, total);
        if (id >= MAX_PENDING) {
            uint64 oldest = _rewardRoots[id + 1 - MAX_PENDING].maturesAt;
            if (block.timestamp < oldest) revert QueueFull(oldest);
        }

        uint64 maturesAt = (block.timestamp + CHALLENGE_DELAY).toUint64();
        _lastRewardId = ++id;
        _rewardRoots[id] = RewardRoot(batch.rewardRoot, total, batch.sequence, maturesAt);
        emit RewardRootQueued(id, batch.rewardRoot, total, batch.sequence, maturesAt);
    }

    /// @notice Strikes a pending root, and with it all that were queued after it (their totals build on it).
    /// @param root what stands at `id`: a veto that arrives late never strikes another root than the one that was meant
    function veto(uint64 id, bytes32 root) external onlyRole(GUARDIAN_ROLE) {
        RewardRoot storage first = _rewardRoots[id];
        if (root == bytes32(0) || first.root != root) revert NoSuchRoot(id);
        if (block.timestamp >= first.maturesAt) revert AlreadyClaimable(id);
        uint64 last = _lastRewardId;
        _lastRewardId = id - 1;
        for (uint64 i = id; i <= last; i++) {
            emit RewardRootVetoed(i, _rewardRoots[i].root, msg.sender);
            delete _rewardRoots[i];
        }
    }

    /// @notice Pays `operator` what its cumulative reward exceeds what it was paid before. Anybody may call it; only the
    /// operator is paid. Nobody can stop this.
    /// @param id a root whose challenge delay has passed; see `claimableId`
    /// @param cumulative the operator's reward over its lifetime, as in the tree
    function claim(uint64 id, address operator, uint256 cumulative, bytes32[] calldata proof)
        external
        nonReentrant
        returns (uint256 amount)
    {
        RewardRoot storage reward = _rewardRoots[id];
        bytes32 root = reward.root;
        if (root == bytes32(0)) revert NoSuchRoot(id);
        if (block.timestamp < reward.maturesAt) revert NotBefore(reward.maturesAt);
        bytes32 leaf = keccak256(bytes.concat(keccak256(abi.encode(operator, cumulative))));
        if (!MerkleProof.verifyCalldata(proof, root, leaf)) revert BadProof();
        uint256 paid = _claimed[operator];
        if (cumulative <= paid) revert NothingToClaim(paid);
        amount = cumulative - paid;
        uint256 sum = totalClaimed + amount;
        if (sum > reward.total) revert BeyondTotal(reward.total, sum);

        _claimed[operator] = cumulative;
        totalClaimed = sum.toUint128();
        emit Claimed(operator, id, amount, cumulative);
        TOKEN.safeTransfer(operator, amount);
    }

    /// @notice What `operator` was paid so far.
    function claimed(address operator) external view returns (uint256) {
        return _claimed[operator];
    }

    /// @notice A reward root; all zero if there is none with this id.
    function rewards(uint64 id) external view returns (RewardRoot memory) {
        return _rewardRoots[id];
    }

    /// @notice The newest reward root, pending or not; 0 before the first.
    function lastRewardId() external view returns (uint64) {
        return _lastRewardId;
    }

    /// @notice The newest reward root that pays now; 0 if none does.
    function claimableId() external view returns (uint64 id) {
        id = _lastRewardId;
        while (id != 0 && block.timestamp < _rewardRoots[id].maturesAt) id--;
    }

    // ---- emergencies ----

    /// @notice Stops deposits, batches, charges and new reward roots. Withdrawals and claims go on.
    function pause() external onlyRole(GUARDIAN_ROLE) {
        _pause();
    }

    /// @notice Ends it.
    function unpause() external onlyRole(GUARDIAN_ROLE) {
        _unpause();
    }

    /// @dev A token that keeps a part of what it moves would break the books: refused.
    function _pull(uint256 amount) private returns (uint128) {
        if (amount == 0) revert ZeroAmount();
        uint256 before = TOKEN.balanceOf(address(this));
        TOKEN.safeTransferFrom(msg.sender, address(this), amount);
        uint256 received = TOKEN.balanceOf(address(this)) - before;
        if (received != amount) revert WrongAmountReceived(amount, received);
        return amount.toUint128();
    }
}
