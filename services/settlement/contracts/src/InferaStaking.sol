// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Ownable} from "@openzeppelin/contracts/access/Ownable.sol";
import {IERC20Permit} from "@openzeppelin/contracts/token/ERC20/extensions/IERC20Permit.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {MessageHashUtils} from "@openzeppelin/contracts/utils/cryptography/MessageHashUtils.sol";
import {Math} from "@openzeppelin/contracts/utils/math/Math.sol";
import {SafeCast} from "@openzeppelin/contracts/utils/math/SafeCast.sol";
import {ReentrancyGuardTransient} from "@openzeppelin/contracts/utils/ReentrancyGuardTransient.sol";
import {InferToken} from "./InferToken.sol";
import {InferaSettlement} from "./InferaSettlement.sol";

/// @title Operators' stake, and what costs it.
/// @notice Stake is lost only by evidence that this contract checks itself, from signatures that the operator's node made:
/// (a) two different answers for one slot (a slot is one node's place in one attempt of a request), or (b) a reveal that
/// contradicts its commitment. Nobody, the owner included, can slash by saying so.
/// @dev Whom a signature binds follows from the operator's own signature of `NodeBinding` (protocol section 1), which comes
/// with the evidence: nothing has to be registered here first. All signatures are in the network's EIP-712 domain: name
/// "Infera", version "1", this chain, the settlement contract. They are plain ECDSA on purpose: a contract wallet could
/// disown a signature afterwards.
contract InferaStaking is Ownable, ReentrancyGuardTransient {
    using SafeERC20 for InferToken;
    using SafeCast for uint256;

    /// @notice What an operator signs to own a node.
    bytes32 public constant NODE_BINDING_TYPEHASH =
        keccak256("NodeBinding(bytes32 node,address signer,uint256 expiryMs)");
    /// @notice What a node's bound signer signs with its commitment.
    bytes32 public constant SLOT_COMMITMENT_TYPEHASH =
        keccak256("SlotCommitment(bytes32 requestHash,uint32 attempt,bytes32 node,bytes32 commitment)");
    /// @notice What a node's bound signer signs with its reveal.
    bytes32 public constant SLOT_REVEAL_TYPEHASH = keccak256(
        "SlotReveal(bytes32 requestHash,uint32 attempt,bytes32 node,bytes32 tokensRoot,bytes32 fingerprintRoot,uint8 finish,bytes32 salt)"
    );
    /// @notice The part of the stake that one slot costs, of 10,000.
    uint256 public constant SLASH_BPS = 5_000;
    /// @notice The reporter's part of what is slashed, of 10,000. The rest is burned, so that an operator that reports
    /// itself still loses.
    uint256 public constant REPORTER_BPS = 1_000;
    /// @notice The longest unbonding period that this contract can be made with.
    uint256 public constant MAX_UNBONDING = 60 days;

    /// @notice What is staked.
    InferToken public immutable TOKEN;
    /// @notice The contract in the domain of all signatures.
    InferaSettlement public immutable SETTLEMENT;
    /// @notice Seconds that stake stays slashable after the operator asked for it; also how long after a binding's expiry
    /// evidence with it counts, so that an old key that leaks is worthless.
    uint256 public immutable UNBONDING;

    /// @notice An operator's stake, 10^-6 INFER.
    struct Position {
        /// Counts for admission.
        uint128 active;
        /// On its way out, and slashable like the rest.
        uint128 unbonding;
        /// When `unbonding` may be withdrawn, seconds since 1970.
        uint64 withdrawableAt;
    }

    /// @notice One node's place in one attempt of a request.
    struct Slot {
        bytes32 requestHash;
        uint32 attempt;
        bytes32 node;
    }

    /// @notice `NodeBinding` of the slot's node: the operator is who signed it.
    struct Binding {
        address signer;
        uint256 expiryMs;
        bytes signature;
    }

    /// @notice A commitment as the node's bound signer signed it (`SlotCommitment`).
    struct Commitment {
        bytes32 commitment;
        bytes signature;
        Binding binding;
    }

    /// @notice A reveal as the node's bound signer signed it (`SlotReveal`).
    struct Reveal {
        bytes32 tokensRoot;
        bytes32 fingerprintRoot;
        uint8 finish;
        bytes32 salt;
        bytes signature;
        Binding binding;
    }

    /// @notice `amount` was added to `operator`'s stake.
    event Staked(address indexed operator, address indexed from, uint256 amount);
    /// @notice `amount` of `operator`'s stake is on its way out; all that is may be withdrawn at `withdrawableAt`.
    event Unstaking(address indexed operator, uint256 amount, uint64 withdrawableAt);
    /// @notice `operator` got `amount` back.
    event Withdrawn(address indexed operator, uint256 amount);
    /// @notice `operator` lost `amount` for a slot; `reward` of it went to `reporter`, the rest was burned.
    event Slashed(
        address indexed operator,
        bytes32 indexed node,
        bytes32 indexed slotHash,
        address reporter,
        uint256 amount,
        uint256 reward
    );
    /// @notice Operators with less active stake get no work.
    event MinimumStakeChanged(uint256 amount);

    /// @notice A constructor argument that cannot work.
    error BadArgument();
    /// @notice An amount must be more than zero.
    error ZeroAmount();
    /// @notice More than the operator's active stake.
    error BeyondStake(uint256 active, uint256 requested);
    /// @notice Nothing is on its way out.
    error NothingUnbonding();
    /// @notice Too early.
    error NotBefore(uint64 time);
    /// @notice The signature is not the bound signer's.
    error NotTheSigner(address expected, address actual);
    /// @notice The two bindings were signed by different operators.
    error OperatorsDiffer(address first, address second);
    /// @notice The binding had expired more than `UNBONDING` before.
    error BindingTooOld(uint256 expiryMs);
    /// @notice The two statements say the same: no evidence of anything.
    error NoContradiction();
    /// @notice The operator has paid for this slot.
    error AlreadySlashed(bytes32 slotHash);
    /// @notice The operator has nothing here.
    error NothingStaked(address operator);

    mapping(address operator => Position) private _positions;
    mapping(bytes32 slotHash => bool) private _slashed;

    /// @notice The sum of all positions. The token balance is never less.
    uint256 public totalStaked;
    /// @notice Operators with less active stake get no work. Governed.
    uint256 public minimumStake;

    /// @param owner_ sets the minimum stake (the timelock); nothing else
    /// @param token what is staked
    /// @param settlement the network's domain
    /// @param unbonding seconds; longer than the settlement's challenge delay, at most `MAX_UNBONDING`
    /// @param minimumStake_ 10^-6 INFER
    constructor(address owner_, InferToken token, InferaSettlement settlement, uint256 unbonding, uint256 minimumStake_)
        Ownable(owner_)
    {
        if (address(settlement.TOKEN()) != address(token)) revert BadArgument();
        if (unbonding <= settlement.CHALLENGE_DELAY() || unbonding > MAX_UNBONDING) revert BadArgument();
        TOKEN = token;
        SETTLEMENT = settlement;
        UNBONDING = unbonding;
        minimumStake = minimumStake_;
        emit MinimumStakeChanged(minimumStake_);
    }

    /// @notice Sets what an operator must have at stake to get work.
    function setMinimumStake(uint256 amount) external onlyOwner {
        minimumStake = amount;
        emit MinimumStakeChanged(amount);
    }

    // ---- stake ----

    /// @notice An operator's stake.
    function position(address operator) external view returns (Position memory) {
        return _positions[operator];
    }

    /// @notice Whether `operator` has enough at stake to get work.
    function isEligible(address operator) external view returns (bool) {
        uint256 active = _positions[operator].active;
        return active != 0 && active >= minimumStake;
    }

    /// @notice Adds `amount` of the caller's tokens to `operator`'s stake.
    function stake(address operator, uint256 amount) external nonReentrant {
        _stake(operator, amount);
    }

    /// @notice The same with the caller's ERC-2612 permit, in one transaction.
    /// @dev A permit that somebody else sent first has done its work: its failure is not looked at, the transfer decides.
    function stakeWithPermit(address operator, uint256 amount, uint256 deadline, uint8 v, bytes32 r, bytes32 s)
        external
        nonReentrant
    {
        try IERC20Permit(address(TOKEN)).permit(msg.sender, address(this), amount, deadline, v, r, s) {} catch {}
        _stake(operator, amount);
    }

    function _stake(address operator, uint256 amount) private {
        if (amount == 0) revert ZeroAmount();
        _positions[operator].active += amount.toUint128();
        totalStaked += amount;
        emit Staked(operator, msg.sender, amount);
        TOKEN.safeTransferFrom(msg.sender, address(this), amount);
    }

    /// @notice Begins to take `amount` out. A second call starts the delay anew for all that is on its way out.
    function unstake(uint256 amount) external {
        if (amount == 0) revert ZeroAmount();
        Position storage mine = _positions[msg.sender];
        if (amount > mine.active) revert BeyondStake(mine.active, amount);
        uint64 withdrawableAt = (block.timestamp + UNBONDING).toUint64();
        mine.active -= uint128(amount);
        mine.unbonding += uint128(amount);
        mine.withdrawableAt = withdrawableAt;
        emit Unstaking(msg.sender, amount, withdrawableAt);
    }

    /// @notice Pays the caller what has come out. Nobody can stop this.
    function withdraw() external nonReentrant returns (uint256 amount) {
        Position storage mine = _positions[msg.sender];
        amount = mine.unbonding;
        if (amount == 0) revert NothingUnbonding();
        if (block.timestamp < mine.withdrawableAt) revert NotBefore(mine.withdrawableAt);
        mine.unbonding = 0;
        mine.withdrawableAt = 0;
        totalStaked -= amount;
        emit Withdrawn(msg.sender, amount);
        TOKEN.safeTransfer(msg.sender, amount);
    }

    // ---- evidence ----

    /// @notice (a) Two different commitments were signed for one slot.
    function slashTwoCommitments(Slot calldata slot, Commitment calldata first, Commitment calldata second)
        external
        nonReentrant
    {
        if (first.commitment == second.commitment) revert NoContradiction();
        _slash(slot, _committed(slot, first), _committed(slot, second));
    }

    /// @notice (a) Two different reveals were signed for one slot.
    function slashTwoReveals(Slot calldata slot, Reveal calldata first, Reveal calldata second) external nonReentrant {
        if (commitmentOf(slot, first) == commitmentOf(slot, second)) revert NoContradiction();
        _slash(slot, _revealed(slot, first), _revealed(slot, second));
    }

    /// @notice (b) What was revealed for a slot is not what was committed to.
    function slashFalseReveal(Slot calldata slot, Commitment calldata committed, Reveal calldata revealed)
        external
        nonReentrant
    {
        if (commitmentOf(slot, revealed) == committed.commitment) revert NoContradiction();
        _slash(slot, _committed(slot, committed), _revealed(slot, revealed));
    }

    /// @notice The commitment that `revealed` opens.
    /// @dev The encoding of `shared/protocol/src/commitment.rs`: big-endian integers, the domain string behind its length.
    function commitmentOf(Slot calldata slot, Reveal calldata revealed) public view returns (bytes32) {
        return keccak256(
            abi.encodePacked(
                uint32(20),
                "infera.commitment.v1",
                uint64(block.chainid),
                address(SETTLEMENT),
                slot.requestHash,
                slot.attempt,
                slot.node,
                revealed.tokensRoot,
                revealed.fingerprintRoot,
                revealed.finish,
                revealed.salt
            )
        );
    }

    /// @notice What `operator` can be slashed for once.
    function hashSlot(address operator, Slot calldata slot) public pure returns (bytes32) {
        return keccak256(abi.encode(operator, slot.requestHash, slot.attempt, slot.node));
    }

    /// @notice Whether an operator has paid for a slot.
    function slashed(bytes32 slotHash) external view returns (bool) {
        return _slashed[slotHash];
    }

    /// @notice The EIP-712 domain separator of all signatures here: the settlement contract's.
    function domainSeparator() public view returns (bytes32) {
        return MessageHashUtils.toDomainSeparator(
            bytes1(0x0f), keccak256("Infera"), keccak256("1"), block.chainid, address(SETTLEMENT), bytes32(0)
        );
    }

    function _committed(Slot calldata slot, Commitment calldata signed) private view returns (address operator) {
        operator = _operator(slot.node, signed.binding);
        bytes32 message = keccak256(
            abi.encode(SLOT_COMMITMENT_TYPEHASH, slot.requestHash, slot.attempt, slot.node, signed.commitment)
        );
        _checkSigner(signed.binding.signer, message, signed.signature);
    }

    function _revealed(Slot calldata slot, Reveal calldata signed) private view returns (address operator) {
        operator = _operator(slot.node, signed.binding);
        bytes32 message = keccak256(
            abi.encode(
                SLOT_REVEAL_TYPEHASH,
                slot.requestHash,
                slot.attempt,
                slot.node,
                signed.tokensRoot,
                signed.fingerprintRoot,
                signed.finish,
                signed.salt
            )
        );
        _checkSigner(signed.binding.signer, message, signed.signature);
    }

    function _operator(bytes32 node, Binding calldata binding) private view returns (address) {
        uint256 nowMs = block.timestamp * 1_000;
        if (binding.expiryMs < nowMs && nowMs - binding.expiryMs > UNBONDING * 1_000) {
            revert BindingTooOld(binding.expiryMs);
        }
        bytes32 message = keccak256(abi.encode(NODE_BINDING_TYPEHASH, node, binding.signer, binding.expiryMs));
        return _recover(message, binding.signature);
    }

    function _checkSigner(address signer, bytes32 message, bytes calldata signature) private view {
        address actual = _recover(message, signature);
        if (actual != signer) revert NotTheSigner(signer, actual);
    }

    function _recover(bytes32 message, bytes calldata signature) private view returns (address) {
        return ECDSA.recoverCalldata(MessageHashUtils.toTypedDataHash(domainSeparator(), message), signature);
    }

    function _slash(Slot calldata slot, address operator, address same) private {
        if (operator != same) revert OperatorsDiffer(operator, same);
        bytes32 slotHash = hashSlot(operator, slot);
        if (_slashed[slotHash]) revert AlreadySlashed(slotHash);
        Position storage theirs = _positions[operator];
        uint256 active = theirs.active;
        uint256 amount = Math.mulDiv(active + theirs.unbonding, SLASH_BPS, 10_000, Math.Rounding.Ceil);
        if (amount == 0) revert NothingStaked(operator);

        _slashed[slotHash] = true;
        uint256 fromActive = Math.min(amount, active);
        theirs.active -= uint128(fromActive);
        theirs.unbonding -= uint128(amount - fromActive);
        totalStaked -= amount;
        uint256 reward = amount * REPORTER_BPS / 10_000;
        emit Slashed(operator, slot.node, slotHash, msg.sender, amount, reward);
        TOKEN.burn(amount - reward);
        if (reward != 0) TOKEN.safeTransfer(msg.sender, reward);
    }
}
