// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Network} from "./Base.sol";
import {NodeTools} from "./Staking.t.sol";
import {InferaSettlement} from "../src/InferaSettlement.sol";
import {InferaStaking} from "../src/InferaStaking.sol";

/// What a whole transaction costs (with the 21,000 of every transaction and its calldata), as it is in daily use: not the
/// first of its kind. Run with --isolate (`../build` does). `../snapshots/` has the figures; here are the limits.
contract GasTest is NodeTools {
    string private constant GROUP = "gas";
    /// An operator in a network of 4,096.
    uint256 private constant OPERATORS = 4_096;

    function setUp() public {
        deploy();
        operator = VM.addr(OPERATOR_KEY);
        post(bytes32(uint256(1)));
        depositFor(alice, 1_000e6);
        depositFor(bob, 1_000e6);
        chargeTo(ALICE_KEY, 1e6);
        chargeTo(BOB_KEY, 1e6);
        fundPool(1_000_000e6);
        stakeFor(operator, 10_000e6);
    }

    function measured(string memory name) private returns (uint256) {
        return VM.snapshotGasLastCall(GROUP, name);
    }

    function testGasOfABatch() public {
        post(keccak256("rewards"));
        assert(measured("postBatch") <= 7 * 10_000);
    }

    function testGasOfACharge() public {
        InferaSettlement.Charge[] memory charges = new InferaSettlement.Charge[](100);
        for (uint256 i = 0; i < 100; i++) {
            uint256 key = 0x1000 + i;
            depositFor(VM.addr(key), 1e6);
            charges[i] = one(VM.addr(key), 10, 10, voucher(key, 10))[0];
        }
        VM.prank(SETTLER);
        settlement.charge(1, charges);
        for (uint256 i = 0; i < 100; i++) {
            charges[i] = one(VM.addr(0x1000 + i), 20, 20, voucher(0x1000 + i, 20))[0];
        }
        VM.prank(SETTLER);
        settlement.charge(1, charges);
        assert(measured("charge of 100 accounts with new vouchers") <= 100 * 30_000);
    }

    function testGasOfARewardRoot() public {
        queueOne(alice, 1);
        InferaSettlement.Batch memory batch = post(keccak256("rewards"));
        VM.prank(SETTLER);
        settlement.queueRewards(batch, 2);
        assert(measured("queueRewards") <= 140_000);
    }

    function testGasOfClaims() public {
        (address[] memory operators, uint256[] memory amounts) = (new address[](OPERATORS), new uint256[](OPERATORS));
        for (uint256 i = 0; i < OPERATORS; i++) {
            (operators[i], amounts[i]) = (address(uint160(0x10000 + i)), 1);
        }
        operators[7] = operator;
        operators[8] = alice;
        (uint64 id, bytes32[] memory tree) = queue(operators, amounts, OPERATORS);
        VM.warp(block.timestamp + CHALLENGE);
        settlement.claim(id, operators[9], 1, proofOf(tree, 9));
        settlement.claim(id, operators[10], 1, proofOf(tree, 10));
        assert(measured("claim, the operator's first tokens") <= 140_000);
        give(operator, 1);
        VM.prank(operator);
        token.delegate(operator);
        settlement.claim(id, operator, 1, proofOf(tree, 7));
        assert(measured("claim, the operator votes") <= 140_000);
        amounts[7] = 2;
        (id, tree) = queue(operators, amounts, OPERATORS + 1);
        VM.warp(block.timestamp + CHALLENGE);
        settlement.claim(id, operator, 2, proofOf(tree, 7));
        assert(measured("claim, not the first") <= 140_000);
        // The dearest there is: the first tokens and the first votes of an operator that delegated before it had any.
        VM.prank(alice);
        token.delegate(alice);
        assert(token.balanceOf(alice) == 0);
        settlement.claim(id, alice, 1, proofOf(tree, 8));
        assert(measured("claim, the operator's first tokens and first votes") <= 160_000);
    }

    function testGasOfAReceiptCheck() public {
        bytes32[] memory leaves = new bytes32[](10_000);
        for (uint256 i = 0; i < leaves.length; i++) {
            leaves[i] = keccak256(abi.encode(i));
        }
        bytes32[] memory tree = treeOf(leaves);
        (uint64 sequence, bytes32 head) = settlement.head();
        VM.prank(SETTLER);
        settlement.postBatch(sequence + 1, head, tree[0], 10_000, 0, 0);
        assert(settlement.verifyReceipt(sequence + 1, leaves[1], proofOf(tree, 1)));
        assert(measured("verifyReceipt of 10,000 (no transaction)") <= 10_000);
    }

    function testGasOfEscrow() public {
        depositFor(alice, 5);
        give(alice, 5);
        VM.startPrank(alice);
        token.approve(address(settlement), 5);
        settlement.deposit(alice, 5);
        assert(measured("deposit") <= 120_000);
        settlement.requestWithdrawal(5);
        measured("requestWithdrawal");
        VM.warp(block.timestamp + WITHDRAWAL);
        settlement.withdraw();
        assert(measured("withdraw") <= 120_000);
        VM.stopPrank();
    }

    function testGasOfStake() public {
        give(operator, 5);
        VM.startPrank(operator);
        token.approve(address(staking), 5);
        staking.stake(operator, 5);
        assert(measured("stake") <= 120_000);
        staking.unstake(5);
        measured("unstake");
        VM.stopPrank();
        InferaStaking.Slot memory slot = slotOf(1);
        staking.slashTwoCommitments(slot, committed(slot, "one"), committed(slot, "two"));
        measured("slashTwoCommitments");
        slot = slotOf(2);
        InferaStaking.Reveal memory said = revealed(slot, 1);
        staking.slashFalseReveal(slot, committed(slot, "one"), said);
        measured("slashFalseReveal");
    }
}
