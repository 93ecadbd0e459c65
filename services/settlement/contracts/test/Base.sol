// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Hashes} from "@openzeppelin/contracts/utils/cryptography/Hashes.sol";
import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {InferToken} from "../src/InferToken.sol";
import {InferaGovernor} from "../src/InferaGovernor.sol";
import {InferaSettlement} from "../src/InferaSettlement.sol";
import {InferaStaking} from "../src/InferaStaking.sol";
import {InferaTimelock} from "../src/InferaTimelock.sol";
import {ModelRegistry} from "../src/ModelRegistry.sol";

/// The cheat codes used here: forge's own, declared by hand because no maintained npm package brings them.
interface Vm {
    function addr(uint256 key) external pure returns (address);
    function assume(bool condition) external;
    function chainId(uint256 id) external;
    function etch(address target, bytes calldata code) external;
    function expectEmit(bool topic1, bool topic2, bool topic3, bool data) external;
    function expectRevert() external;
    function expectRevert(bytes4 selector) external;
    function expectRevert(bytes calldata data) external;
    function prank(address sender) external;
    function sign(uint256 key, bytes32 digest) external pure returns (uint8 v, bytes32 r, bytes32 s);
    function snapshotGasLastCall(string calldata group, string calldata name) external returns (uint256 gas);
    function startPrank(address sender) external;
    function stopPrank() external;
    function warp(uint256 time) external;
}

/// What every test has: assertions, signatures, Merkle trees.
abstract contract Tools {
    Vm internal constant VM = Vm(0x7109709ECfa91a80626fF3989D68f67F5b1DD12D);

    error Differs(string what, uint256 actual, uint256 expected);
    error DiffersHash(string what, bytes32 actual, bytes32 expected);

    function eq(uint256 actual, uint256 expected, string memory what) internal pure {
        if (actual != expected) revert Differs(what, actual, expected);
    }

    function eq(bytes32 actual, bytes32 expected, string memory what) internal pure {
        if (actual != expected) revert DiffersHash(what, actual, expected);
    }

    function bound(uint256 value, uint256 low, uint256 high) internal pure returns (uint256) {
        return low + value % (high - low + 1);
    }

    function signature(uint256 key, bytes32 hash) internal pure returns (bytes memory) {
        (uint8 v, bytes32 r, bytes32 s) = VM.sign(key, hash);
        return abi.encodePacked(r, s, v);
    }

    /// The network's EIP-712 digest, written out by hand: what the contracts compute is compared with it.
    function digest(uint256 chainId, address settlement, bytes32 message) internal pure returns (bytes32) {
        bytes32 separator = keccak256(
            abi.encode(
                keccak256("EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)"),
                keccak256("Infera"),
                keccak256("1"),
                chainId,
                settlement
            )
        );
        return keccak256(abi.encodePacked(bytes2(0x1901), separator, message));
    }

    function rewardLeaf(address operator, uint256 cumulative) internal pure returns (bytes32) {
        return keccak256(bytes.concat(keccak256(abi.encode(operator, cumulative))));
    }

    function rewardTree(address[] memory operators, uint256[] memory cumulative)
        internal
        pure
        returns (bytes32[] memory)
    {
        bytes32[] memory leaves = new bytes32[](operators.length);
        for (uint256 i = 0; i < leaves.length; i++) {
            leaves[i] = rewardLeaf(operators[i], cumulative[i]);
        }
        return treeOf(leaves);
    }

    /// OpenZeppelin's standard tree: leaves in reverse at the end of a complete binary tree (sorted in the library; the
    /// order does not matter for proofs).
    function treeOf(bytes32[] memory leaves) internal pure returns (bytes32[] memory tree) {
        tree = new bytes32[](2 * leaves.length - 1);
        for (uint256 i = 0; i < leaves.length; i++) {
            tree[tree.length - 1 - i] = leaves[i];
        }
        for (uint256 i = tree.length - leaves.length; i > 0; i--) {
            tree[i - 1] = Hashes.commutativeKeccak256(tree[2 * i - 1], tree[2 * i]);
        }
    }

    /// The proof of the leaf that was given as the `leaf`-th.
    function proofOf(bytes32[] memory tree, uint256 leaf) internal pure returns (bytes32[] memory proof) {
        uint256 place = tree.length - 1 - leaf;
        uint256 depth = 0;
        for (uint256 i = place; i > 0; i = (i - 1) / 2) {
            depth++;
        }
        proof = new bytes32[](depth);
        uint256 step = 0;
        for (uint256 i = place; i > 0; i = (i - 1) / 2) {
            proof[step++] = tree[i % 2 == 1 ? i + 1 : i - 1];
        }
    }
}

/// A whole network, deployed in the order of the README and handed over to the timelock.
abstract contract Network is Tools {
    uint256 internal constant CHAIN = 31_337;
    uint256 internal constant CHALLENGE = 1 days;
    uint256 internal constant WITHDRAWAL = 2 days;
    uint256 internal constant UNBONDING = 14 days;
    uint256 internal constant MINIMUM_STAKE = 1_000e6;
    uint256 internal constant TIMELOCK_DELAY = 2 days;
    uint48 internal constant VOTING_DELAY = 1 hours;
    uint32 internal constant VOTING_PERIOD = 3 days;
    uint256 internal constant PROPOSAL_THRESHOLD = 100_000e6;
    uint256 internal constant QUORUM_PERCENT = 4;
    uint256 internal constant START = 1_800_000_000;

    address internal constant DEPLOYER = address(0xD);
    address internal constant SETTLER = address(0x5E);
    address internal constant GUARDIAN = address(0x6A);
    address internal constant STRANGER = address(0xBAD);
    uint256 internal constant ALICE_KEY = 0xA11CE;
    uint256 internal constant BOB_KEY = 0xB0B;
    address internal alice;
    address internal bob;

    InferToken internal token;
    InferaTimelock internal timelock;
    InferaGovernor internal governor;
    InferaSettlement internal settlement;
    InferaStaking internal staking;
    ModelRegistry internal registry;

    function deploy() internal {
        VM.chainId(CHAIN);
        VM.warp(START);
        alice = VM.addr(ALICE_KEY);
        bob = VM.addr(BOB_KEY);
        VM.startPrank(DEPLOYER);
        address[] memory nobody = new address[](0);
        address[] memory everybody = new address[](1);
        timelock = new InferaTimelock(TIMELOCK_DELAY, nobody, everybody, DEPLOYER);
        token = new InferToken(DEPLOYER);
        governor = new InferaGovernor(token, timelock, VOTING_DELAY, VOTING_PERIOD, PROPOSAL_THRESHOLD, QUORUM_PERCENT);
        settlement = new InferaSettlement(token, address(timelock), SETTLER, GUARDIAN, CHALLENGE, WITHDRAWAL);
        staking = new InferaStaking(address(timelock), token, settlement, UNBONDING, MINIMUM_STAKE);
        registry = new ModelRegistry(DEPLOYER);
        timelock.grantRole(timelock.PROPOSER_ROLE(), address(governor));
        timelock.grantRole(timelock.CANCELLER_ROLE(), address(governor));
        registry.admitModel("smollm2-135m-instruct", someModel(1));
        registry.transferOwnership(address(timelock));
        timelock.renounceRole(timelock.DEFAULT_ADMIN_ROLE(), DEPLOYER);
        VM.stopPrank();
    }

    function someModel(uint256 salt) internal pure returns (ModelRegistry.Model memory) {
        return ModelRegistry.Model({
            weightsRoot: keccak256(abi.encode("weights", salt)),
            tokenizerHash: keccak256(abi.encode("tokenizer", salt)),
            templateHash: keccak256(abi.encode("template", salt)),
            endTokensHash: keccak256(abi.encodePacked(uint32(2))),
            vocabSize: 49_152,
            contextLength: 2_048,
            similarityThreshold: 700_000,
            priceCap: 5,
            active: true
        });
    }

    function give(address to, uint256 amount) internal {
        VM.prank(DEPLOYER);
        require(token.transfer(to, amount));
    }

    /// `who` deposits into its own escrow, with new tokens.
    function depositFor(address who, uint256 amount) internal {
        give(who, amount);
        VM.startPrank(who);
        token.approve(address(settlement), amount);
        settlement.deposit(who, amount);
        VM.stopPrank();
    }

    function fundPool(uint256 amount) internal {
        VM.startPrank(DEPLOYER);
        token.approve(address(settlement), amount);
        settlement.fund(amount);
        VM.stopPrank();
    }

    function voucher(uint256 key, uint256 cumulative) internal view returns (bytes memory) {
        return voucherFor(CHAIN, address(settlement), key, VM.addr(key), cumulative);
    }

    function voucherFor(uint256 chainId, address contract_, uint256 key, address account, uint256 cumulative)
        internal
        pure
        returns (bytes memory)
    {
        bytes32 message = keccak256(
            abi.encode(keccak256("Voucher(address account,uint256 cumulative)"), account, cumulative)
        );
        return signature(key, digest(chainId, contract_, message));
    }

    function one(address account, uint256 cumulative, uint256 allowed, bytes memory signed)
        internal
        pure
        returns (InferaSettlement.Charge[] memory charges)
    {
        charges = new InferaSettlement.Charge[](1);
        charges[0] = InferaSettlement.Charge(account, uint128(cumulative), uint128(allowed), signed);
    }

    /// Charges `cumulative` by a voucher of the same amount.
    function chargeTo(uint256 key, uint256 cumulative) internal {
        InferaSettlement.Charge[] memory charges = one(VM.addr(key), cumulative, cumulative, voucher(key, cumulative));
        (uint64 sequence,) = settlement.head();
        VM.prank(SETTLER);
        settlement.charge(sequence, charges);
    }

    /// Posts the next batch, with this reward root, and returns its fields.
    function post(bytes32 rewardRoot) internal returns (InferaSettlement.Batch memory batch) {
        (uint64 sequence, bytes32 head) = settlement.head();
        bytes32 receipts = keccak256(abi.encode("receipts", sequence + 1));
        batch = InferaSettlement.Batch(sequence + 1, head, receipts, 10, rewardRoot, 9);
        VM.prank(SETTLER);
        settlement.postBatch(batch.sequence, head, receipts, 10, rewardRoot, 9);
    }

    /// Posts a batch whose reward root has these leaves, and queues the root.
    function queue(address[] memory operators, uint256[] memory cumulative, uint256 total)
        internal
        returns (uint64 id, bytes32[] memory tree)
    {
        tree = rewardTree(operators, cumulative);
        InferaSettlement.Batch memory batch = post(tree[0]);
        VM.prank(SETTLER);
        settlement.queueRewards(batch, uint128(total));
        id = settlement.lastRewardId();
    }

    /// A queue of one leaf for `operator` and one that never claims.
    function queueOne(address operator, uint256 cumulative) internal returns (uint64 id, bytes32[] memory proof) {
        (address[] memory operators, uint256[] memory amounts) = (new address[](2), new uint256[](2));
        (operators[0], operators[1]) = (operator, address(0xF00D));
        amounts[0] = cumulative;
        bytes32[] memory tree;
        (id, tree) = queue(operators, amounts, cumulative);
        proof = proofOf(tree, 0);
    }

    function owed() internal view returns (uint256) {
        return uint256(settlement.totalEscrow()) + settlement.totalFunded() - settlement.totalClaimed();
    }
}
