// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Network, Tools} from "./Base.sol";
import {NodeTools} from "./Staking.t.sol";
import {InferToken} from "../src/InferToken.sol";
import {InferaSettlement} from "../src/InferaSettlement.sol";
import {InferaStaking} from "../src/InferaStaking.sol";

/// Random histories of the settlement contract: consumers, a settler that is honest or tries more, claims, vetoes.
/// Actions that the contract refuses are refusals that the handler foresaw; anything else fails the run.
contract SettlementHandler is Tools {
    uint256 private constant CONSUMERS = 4;
    uint256 private constant OPERATORS = 3;

    InferaSettlement private immutable SETTLEMENT;
    InferToken private immutable TOKEN;
    address private immutable BANK;
    address private immutable SETTLER;
    address private immutable GUARDIAN;
    uint256 private immutable CHAIN;

    /// What the contract must agree with.
    uint64 public posted;
    uint256 public accepted;
    mapping(address consumer => uint256) public signed;
    mapping(address operator => uint256) public paid;
    mapping(uint64 id => bytes32[]) private _trees;
    mapping(uint64 id => uint256[]) private _rewards;
    uint256[] private _latest;

    constructor(InferaSettlement settlement, InferToken token, address bank, address settler, address guardian) {
        (SETTLEMENT, TOKEN, BANK, SETTLER, GUARDIAN) = (settlement, token, bank, settler, guardian);
        CHAIN = block.chainid;
        _latest = new uint256[](OPERATORS);
    }

    function keyOf(uint256 seed) private pure returns (uint256) {
        return 0xC0 + seed % CONSUMERS;
    }

    function consumer(uint256 seed) public pure returns (address) {
        return VM.addr(keyOf(seed));
    }

    function operator(uint256 seed) public pure returns (address) {
        return address(uint160(0x0900 + seed % OPERATORS));
    }

    function deposit(uint256 who, uint256 amount) external {
        amount = bound(amount, 1, 1_000e6);
        VM.startPrank(BANK);
        TOKEN.approve(address(SETTLEMENT), amount);
        SETTLEMENT.deposit(consumer(who), amount);
        VM.stopPrank();
    }

    function fund(uint256 amount) external {
        amount = bound(amount, 1, 100e6);
        VM.startPrank(BANK);
        TOKEN.approve(address(SETTLEMENT), amount);
        SETTLEMENT.fund(amount);
        VM.stopPrank();
    }

    function requestWithdrawal(uint256 who, uint256 amount) external {
        uint256 escrow = SETTLEMENT.account(consumer(who)).escrow;
        if (escrow == 0) return;
        VM.prank(consumer(who));
        SETTLEMENT.requestWithdrawal(bound(amount, 1, escrow));
    }

    function withdraw(uint256 who) external {
        InferaSettlement.Account memory account = SETTLEMENT.account(consumer(who));
        if (account.withdrawal == 0 || block.timestamp < account.withdrawableAt) return;
        uint256 before = TOKEN.balanceOf(consumer(who));
        VM.prank(consumer(who));
        uint256 amount = SETTLEMENT.withdraw();
        assert(amount <= account.escrow && amount <= account.withdrawal);
        eq(TOKEN.balanceOf(consumer(who)), before + amount, "withdrawn");
    }

    function sleep(uint256 time) external {
        VM.warp(block.timestamp + bound(time, 1 minutes, 12 hours));
    }

    /// Charges up to what is signed now, sometimes more than the escrow, sometimes less than before.
    function charge(uint256 who, uint256 more, uint256 part) external {
        (uint64 sequence,) = SETTLEMENT.head();
        if (sequence == 0) return;
        address account = consumer(who);
        signed[account] += bound(more, 0, 500e6);
        uint256 cumulative = bound(part, 0, signed[account]);
        uint256 before = SETTLEMENT.account(account).charged;
        _charge(sequence, account, who, cumulative);
        uint256 charged = SETTLEMENT.account(account).charged;
        assert(charged >= before && (charged == before || charged <= cumulative));
        accepted += charged - before;
    }

    function _charge(uint64 sequence, address account, uint256 who, uint256 cumulative) private {
        bytes32 message =
            keccak256(abi.encode(keccak256("Voucher(address account,uint256 cumulative)"), account, signed[account]));
        InferaSettlement.Charge[] memory charges = new InferaSettlement.Charge[](1);
        charges[0] = InferaSettlement.Charge(
            account,
            uint128(cumulative),
            uint128(signed[account]),
            signature(keyOf(who), digest(CHAIN, address(SETTLEMENT), message))
        );
        VM.prank(SETTLER);
        SETTLEMENT.charge(sequence, charges);
    }

    /// A batch, sometimes with rewards that are queued: as much as the pool has room for, to random operators.
    function post(uint256 seed, bool withRewards) external {
        (uint64 sequence, bytes32 head) = SETTLEMENT.head();
        uint256 sum = 0;
        uint64 last = SETTLEMENT.lastRewardId();
        uint256[] memory rewards = last == 0 ? new uint256[](OPERATORS) : _rewards[last];
        uint256[] memory next = new uint256[](OPERATORS);
        for (uint256 i = 0; i < OPERATORS; i++) {
            next[i] = rewards[i];
            sum += next[i];
        }
        uint256 room = SETTLEMENT.totalFunded() - sum;
        for (uint256 i = 0; i < OPERATORS; i++) {
            uint256 share = uint256(keccak256(abi.encode(seed, i))) % (room + 1);
            (next[i], room, sum) = (next[i] + share, room - share, sum + share);
        }
        _post(sequence + 1, head, next, withRewards, sum);
    }

    function _post(uint64 sequence, bytes32 head, uint256[] memory amounts, bool withRewards, uint256 sum) private {
        address[] memory operators = new address[](OPERATORS);
        for (uint256 i = 0; i < OPERATORS; i++) {
            operators[i] = operator(i);
        }
        bytes32[] memory tree = rewardTree(operators, amounts);
        bytes32 receipts = keccak256(abi.encode(sequence));
        bytes32 root = withRewards ? tree[0] : bytes32(0);
        VM.prank(SETTLER);
        SETTLEMENT.postBatch(sequence, head, receipts, 1, root, 0);
        posted++;
        if (!withRewards || !_roomInQueue()) return;
        VM.prank(SETTLER);
        SETTLEMENT.queueRewards(InferaSettlement.Batch(sequence, head, receipts, 1, root, 0), uint128(sum));
        uint64 id = SETTLEMENT.lastRewardId();
        _trees[id] = tree;
        _rewards[id] = amounts;
    }

    function _roomInQueue() private view returns (bool) {
        uint64 last = SETTLEMENT.lastRewardId();
        uint64 most = SETTLEMENT.MAX_PENDING();
        return last < most || SETTLEMENT.rewards(last + 1 - most).maturesAt <= block.timestamp;
    }

    /// Claims by any root, pending and old ones too.
    function claim(uint256 who, uint256 which) external {
        uint64 last = SETTLEMENT.lastRewardId();
        if (last == 0) return;
        uint64 id = uint64(bound(which, 1, last));
        uint256 index = who % OPERATORS;
        uint256 cumulative = _rewards[id][index];
        address to = operator(index);
        uint256 before = TOKEN.balanceOf(to);
        try SETTLEMENT.claim(id, to, cumulative, proofOf(_trees[id], index)) returns (uint256 amount) {
            assert(SETTLEMENT.rewards(id).maturesAt <= block.timestamp);
            paid[to] += amount;
            eq(paid[to], cumulative, "paid is what the tree says");
            eq(TOKEN.balanceOf(to), before + amount, "balance");
        } catch (bytes memory why) {
            bytes4 reason = bytes4(why);
            assert(
                reason == InferaSettlement.NotBefore.selector || reason == InferaSettlement.NothingToClaim.selector
                    || reason == InferaSettlement.BeyondTotal.selector
            );
            // By the newest root that pays, nobody is refused what it has not got yet.
            assert(reason != InferaSettlement.BeyondTotal.selector || id != SETTLEMENT.claimableId());
        }
    }

    function veto(uint256 which) external {
        uint64 last = SETTLEMENT.lastRewardId();
        uint64 claimable = SETTLEMENT.claimableId();
        if (last == claimable || which % 4 != 0) return;
        uint64 id = uint64(bound(which / 4, claimable + 1, last));
        bytes32 root = SETTLEMENT.rewards(id).root;
        VM.prank(GUARDIAN);
        SETTLEMENT.veto(id, root);
    }

    function consumersSum() external view returns (uint256 escrow, uint256 charged) {
        for (uint256 i = 0; i < CONSUMERS; i++) {
            InferaSettlement.Account memory account = SETTLEMENT.account(consumer(i));
            escrow += account.escrow;
            charged += account.charged;
            assert(account.charged <= account.authorized && account.authorized <= signed[consumer(i)]);
        }
    }

    function operatorsSum() external view returns (uint256 sum) {
        for (uint256 i = 0; i < OPERATORS; i++) {
            eq(SETTLEMENT.claimed(operator(i)), paid[operator(i)], "claimed");
            sum += paid[operator(i)];
        }
    }
}

/// What forge asks an invariant test for.
abstract contract Targets {
    address[] private _targets;

    function target(address handler) internal {
        _targets.push(handler);
    }

    function targetContracts() external view returns (address[] memory) {
        return _targets;
    }
}

contract SettlementInvariants is Network, Targets {
    SettlementHandler private handler;

    function setUp() public {
        deploy();
        handler = new SettlementHandler(settlement, token, DEPLOYER, SETTLER, GUARDIAN);
        target(address(handler));
    }

    function invariant_theContractHoldsWhatItOwesToTheLastUnit() public view {
        eq(token.balanceOf(address(settlement)), owed(), "balance");
        (uint256 escrow, uint256 charged) = handler.consumersSum();
        eq(settlement.totalEscrow(), escrow, "the sum of escrows");
        eq(charged, handler.accepted(), "charged");
        eq(handler.operatorsSum(), settlement.totalClaimed(), "the sum of claims");
        uint64 claimable = settlement.claimableId();
        assert(settlement.totalClaimed() <= settlement.rewards(claimable).total);
        assert(settlement.rewards(settlement.lastRewardId()).total <= settlement.totalFunded());
        (uint64 sequence,) = settlement.head();
        eq(sequence, handler.posted(), "sequence");
        assert(settlement.batches(sequence + 1) == bytes32(0));
        assert(sequence == 0 || settlement.batches(sequence) == keccak256(abi.encode(sequence)));
    }
}

/// Random histories of the staking contract.
contract StakingHandler is NodeTools {
    uint256 private constant OPERATORS = 3;

    /// What came in, went out, was burned and was given to reporters.
    uint256 public entered;
    uint256 public left;
    uint256 public burned;
    uint256 public rewarded;
    mapping(bytes32 slot => bool) public paid;

    constructor(InferaStaking staking_, InferaSettlement settlement_, InferToken token_) {
        (staking, settlement, token) = (staking_, settlement_, token_);
    }

    function keyOf(uint256 seed) private pure returns (uint256) {
        return 0x0900 + seed % OPERATORS;
    }

    function stake(uint256 who, uint256 amount) external {
        amount = bound(amount, 1, 10_000e6);
        entered += amount;
        stakeFor(VM.addr(keyOf(who)), amount);
    }

    function unstake(uint256 who, uint256 amount) external {
        address cheat = VM.addr(keyOf(who));
        uint256 active = staking.position(cheat).active;
        if (active == 0) return;
        VM.prank(cheat);
        staking.unstake(bound(amount, 1, active));
    }

    function withdraw(uint256 who) external {
        address cheat = VM.addr(keyOf(who));
        InferaStaking.Position memory position = staking.position(cheat);
        if (position.unbonding == 0 || block.timestamp < position.withdrawableAt) return;
        VM.prank(cheat);
        left += staking.withdraw();
    }

    function sleep(uint256 time) external {
        VM.warp(block.timestamp + bound(time, 1 hours, 10 days));
    }

    function slash(uint256 who, uint8 request) external {
        uint256 key = keyOf(who);
        InferaStaking.Slot memory slot = slotOf(request % 16);
        bytes32 slotHash = staking.hashSlot(VM.addr(key), slot);
        InferaStaking.Commitment memory first = committed(slot, "one");
        InferaStaking.Commitment memory second = committed(slot, "two");
        first.binding = binding(key, NODE_KEY, NODE, (block.timestamp + 1 days) * 1_000);
        second.binding = first.binding;
        InferaStaking.Position memory position = staking.position(VM.addr(key));
        bool possible = !paid[slotHash] && position.active + position.unbonding != 0;
        uint256 supply = token.totalSupply();
        uint256 before = token.balanceOf(STRANGER);
        VM.prank(STRANGER);
        try staking.slashTwoCommitments(slot, first, second) {
            assert(possible);
            paid[slotHash] = true;
            burned += supply - token.totalSupply();
            rewarded += token.balanceOf(STRANGER) - before;
        } catch {
            assert(!possible);
        }
    }

    function positions() external view returns (uint256 sum) {
        for (uint256 i = 0; i < OPERATORS; i++) {
            InferaStaking.Position memory position = staking.position(VM.addr(keyOf(i)));
            sum += position.active + position.unbonding;
        }
    }
}

contract StakingInvariants is Network, Targets {
    StakingHandler private handler;

    function setUp() public {
        deploy();
        handler = new StakingHandler(staking, settlement, token);
        target(address(handler));
    }

    function invariant_everyUnitOfStakeIsAccountedFor() public view {
        uint256 sum = handler.positions();
        eq(staking.totalStaked(), sum, "the sum of positions");
        eq(token.balanceOf(address(staking)), sum, "balance");
        eq(handler.entered(), sum + handler.left() + handler.burned() + handler.rewarded(), "where it went");
        eq(token.totalSupply(), token.INITIAL_SUPPLY() - handler.burned(), "supply");
    }
}
