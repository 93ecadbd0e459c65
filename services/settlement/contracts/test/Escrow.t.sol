// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IAccessControl} from "@openzeppelin/contracts/access/IAccessControl.sol";
import {Pausable} from "@openzeppelin/contracts/utils/Pausable.sol";
import {Network} from "./Base.sol";
import {InferaSettlement} from "../src/InferaSettlement.sol";

/// Deposits, withdrawals, vouchers, charges.
contract EscrowTest is Network {
    uint256 private constant CURVE_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141;

    function setUp() public {
        deploy();
        post(bytes32(0));
    }

    function account(address who) private view returns (InferaSettlement.Account memory) {
        return settlement.account(who);
    }

    function expectCharge(InferaSettlement.Charge[] memory charges, bytes memory reason) private {
        VM.prank(SETTLER);
        VM.expectRevert(reason);
        settlement.charge(1, charges);
    }

    // ---- deposits and withdrawals ----

    function testADepositIsCreditedToWhomItIsFor(uint64 amount) public {
        VM.assume(amount != 0 && amount <= token.balanceOf(DEPLOYER));
        VM.startPrank(DEPLOYER);
        token.approve(address(settlement), amount);
        VM.expectEmit(true, true, true, true);
        emit InferaSettlement.Deposited(alice, DEPLOYER, amount);
        settlement.deposit(alice, amount);
        VM.stopPrank();
        eq(account(alice).escrow, amount, "escrow");
        eq(settlement.totalEscrow(), amount, "total");
        eq(token.balanceOf(address(settlement)), amount, "balance");
    }

    function testADepositByPermitNeedsNoApproval() public {
        give(alice, 50);
        bytes32 permit = keccak256(
            abi.encode(
                keccak256("Permit(address owner,address spender,uint256 value,uint256 nonce,uint256 deadline)"),
                alice,
                address(settlement),
                50,
                0,
                START + 1
            )
        );
        (uint8 v, bytes32 r, bytes32 s) =
            VM.sign(ALICE_KEY, keccak256(abi.encodePacked(bytes2(0x1901), token.DOMAIN_SEPARATOR(), permit)));
        // Somebody sends the permit first: the deposit goes through all the same.
        VM.prank(STRANGER);
        token.permit(alice, address(settlement), 50, START + 1, v, r, s);
        VM.prank(alice);
        settlement.depositWithPermit(alice, 50, START + 1, v, r, s);
        eq(account(alice).escrow, 50, "escrow");

        VM.prank(STRANGER);
        VM.expectRevert();
        settlement.depositWithPermit(STRANGER, 50, START + 1, v, r, s);
    }

    function testAWithdrawalWaitsAndPaysOnce() public {
        depositFor(alice, 100);
        VM.prank(alice);
        settlement.requestWithdrawal(70);
        VM.warp(START + WITHDRAWAL - 1);
        VM.prank(alice);
        VM.expectRevert(abi.encodeWithSelector(InferaSettlement.NotBefore.selector, START + WITHDRAWAL));
        settlement.withdraw();
        VM.warp(START + WITHDRAWAL);
        VM.prank(alice);
        settlement.withdraw();
        eq(token.balanceOf(alice), 70, "paid");
        eq(account(alice).escrow, 30, "escrow");
        VM.prank(alice);
        VM.expectRevert(InferaSettlement.NoWithdrawal.selector);
        settlement.withdraw();
    }

    function testNobodyWithdrawsWithoutHavingDeposited() public {
        depositFor(alice, 100);
        VM.prank(STRANGER);
        VM.expectRevert(abi.encodeWithSelector(InferaSettlement.BeyondEscrow.selector, 0, 1));
        settlement.requestWithdrawal(1);
        VM.prank(alice);
        VM.expectRevert(abi.encodeWithSelector(InferaSettlement.BeyondEscrow.selector, 100, 101));
        settlement.requestWithdrawal(101);
        VM.prank(alice);
        VM.expectRevert(InferaSettlement.ZeroAmount.selector);
        settlement.requestWithdrawal(0);
    }

    function testASecondRequestStartsAnewAndACancelledOnePaysNothing() public {
        depositFor(alice, 100);
        VM.prank(alice);
        settlement.requestWithdrawal(70);
        VM.warp(START + WITHDRAWAL);
        VM.prank(alice);
        settlement.requestWithdrawal(100);
        VM.prank(alice);
        VM.expectRevert(abi.encodeWithSelector(InferaSettlement.NotBefore.selector, START + 2 * WITHDRAWAL));
        settlement.withdraw();
        VM.prank(alice);
        settlement.cancelWithdrawal();
        VM.warp(START + 2 * WITHDRAWAL);
        VM.prank(alice);
        VM.expectRevert(InferaSettlement.NoWithdrawal.selector);
        settlement.withdraw();
        eq(account(alice).escrow, 100, "escrow");
    }

    /// The thief uses the network and then takes the money out: what was used is charged within the delay.
    function testWhatIsHeldCannotBeWithdrawn() public {
        depositFor(alice, 100);
        VM.prank(alice);
        settlement.requestWithdrawal(100);
        VM.warp(START + WITHDRAWAL - 1);
        chargeTo(ALICE_KEY, 80);
        VM.warp(START + WITHDRAWAL);
        VM.prank(alice);
        eq(settlement.withdraw(), 20, "the rest");
        eq(token.balanceOf(alice), 20, "paid");
        eq(account(alice).escrow, 0, "escrow");
    }

    function testAPauseStopsDepositsButNoWithdrawal() public {
        depositFor(alice, 100);
        VM.prank(GUARDIAN);
        settlement.pause();
        VM.prank(alice);
        VM.expectRevert(Pausable.EnforcedPause.selector);
        settlement.deposit(alice, 1);
        VM.prank(SETTLER);
        VM.expectRevert(Pausable.EnforcedPause.selector);
        settlement.charge(1, one(alice, 1, 1, voucher(ALICE_KEY, 1)));
        VM.prank(alice);
        settlement.requestWithdrawal(100);
        VM.warp(START + WITHDRAWAL);
        VM.prank(alice);
        eq(settlement.withdraw(), 100, "withdrawn");
        bytes32 role = settlement.GUARDIAN_ROLE();
        VM.prank(SETTLER);
        VM.expectRevert(abi.encodeWithSelector(IAccessControl.AccessControlUnauthorizedAccount.selector, SETTLER, role));
        settlement.unpause();
    }

    // ---- charges ----

    function testAChargeGoesIntoThePoolAndToNobody() public {
        depositFor(alice, 100);
        VM.prank(SETTLER);
        VM.expectEmit(true, true, true, true);
        emit InferaSettlement.VoucherRecorded(alice, 60);
        VM.expectEmit(true, true, true, true);
        emit InferaSettlement.Charged(1, alice, 40, 40);
        settlement.charge(1, one(alice, 40, 60, voucher(ALICE_KEY, 60)));
        eq(account(alice).escrow, 60, "escrow");
        eq(account(alice).charged, 40, "charged");
        eq(account(alice).authorized, 60, "authorized");
        eq(settlement.totalFunded(), 40, "pool");
        eq(token.balanceOf(SETTLER), 0, "settler");
        eq(token.balanceOf(address(settlement)), 100, "balance");
    }

    /// The settler that takes too much, in every way it can try.
    function testTheSettlerTakesNoMoreThanWasSigned(uint128 allowed, uint128 wanted) public {
        depositFor(alice, 1_000);
        allowed = uint128(bound(allowed, 0, 1_000));
        wanted = uint128(bound(wanted, uint256(allowed) + 1, type(uint128).max));
        bytes memory signed = voucher(ALICE_KEY, allowed);
        // Beyond the voucher; with a voucher that says more than was signed; without any.
        bytes memory beyond = abi.encodeWithSelector(InferaSettlement.BeyondVoucher.selector, alice, allowed, wanted);
        expectCharge(one(alice, wanted, allowed, signed), beyond);
        bytes memory bad = abi.encodeWithSelector(InferaSettlement.BadVoucher.selector, alice);
        expectCharge(one(alice, wanted, wanted, signed), bad);
        expectCharge(one(alice, wanted, wanted, ""), bad);
        beyond = abi.encodeWithSelector(InferaSettlement.BeyondVoucher.selector, alice, 0, wanted);
        expectCharge(one(alice, wanted, 0, ""), beyond);
        eq(account(alice).escrow, 1_000, "escrow");
    }

    function testTheSettlerTakesNoMoreThanTheEscrow() public {
        depositFor(alice, 100);
        depositFor(bob, 1_000);
        bytes memory signed = voucher(ALICE_KEY, 500);
        VM.prank(SETTLER);
        VM.expectEmit(true, true, true, true);
        emit InferaSettlement.Charged(1, alice, 100, 100);
        VM.expectEmit(true, true, true, true);
        emit InferaSettlement.ChargedShort(1, alice, 250);
        settlement.charge(1, one(alice, 350, 500, signed));
        eq(account(alice).charged, 100, "charged");
        eq(account(bob).escrow, 1_000, "somebody else's escrow");
        // What is still owed is charged when there is money again.
        depositFor(alice, 300);
        VM.prank(SETTLER);
        settlement.charge(1, one(alice, 350, 0, ""));
        eq(account(alice).charged, 350, "charged");
        eq(account(alice).escrow, 50, "escrow");
    }

    function testAReplayedVoucherOrChargeTakesNothing() public {
        depositFor(alice, 1_000);
        bytes memory first = voucher(ALICE_KEY, 100);
        VM.prank(SETTLER);
        settlement.charge(1, one(alice, 100, 100, first));
        for (uint256 i = 0; i < 3; i++) {
            VM.prank(SETTLER);
            settlement.charge(1, one(alice, 100, 100, first));
            VM.prank(SETTLER);
            settlement.charge(1, one(alice, 40, 100, first));
        }
        eq(account(alice).charged, 100, "charged");
        bytes memory beyond = abi.encodeWithSelector(InferaSettlement.BeyondVoucher.selector, alice, 100, 200);
        expectCharge(one(alice, 200, 100, first), beyond);
        // An older, smaller voucher does not take the newer one back.
        VM.prank(SETTLER);
        settlement.charge(1, one(alice, 150, 300, voucher(ALICE_KEY, 300)));
        VM.prank(SETTLER);
        settlement.charge(1, one(alice, 250, 100, first));
        eq(account(alice).charged, 250, "charged");
    }

    function testAVoucherOfAnotherChainContractOrAccountIsRefused() public {
        depositFor(alice, 1_000);
        bytes memory bad = abi.encodeWithSelector(InferaSettlement.BadVoucher.selector, alice);
        address here = address(settlement);
        expectCharge(one(alice, 9, 9, voucherFor(1, here, ALICE_KEY, alice, 9)), bad);
        expectCharge(one(alice, 9, 9, voucherFor(CHAIN, address(staking), ALICE_KEY, alice, 9)), bad);
        expectCharge(one(alice, 9, 9, voucherFor(CHAIN, here, BOB_KEY, bob, 9)), bad);
        expectCharge(one(alice, 9, 9, voucherFor(CHAIN, here, BOB_KEY, alice, 9)), bad);
        expectCharge(one(alice, 9, 9, voucherFor(CHAIN, here, ALICE_KEY, alice, 8)), bad);
        // The same voucher after the chain has split off.
        bytes memory good = voucher(ALICE_KEY, 9);
        VM.chainId(CHAIN + 1);
        expectCharge(one(alice, 9, 9, good), bad);
        VM.chainId(CHAIN);
        VM.prank(SETTLER);
        settlement.charge(1, one(alice, 9, 9, good));
    }

    function testASignatureInAnotherFormIsRefused() public {
        depositFor(alice, 1_000);
        bytes memory bad = abi.encodeWithSelector(InferaSettlement.BadVoucher.selector, alice);
        bytes memory good = voucher(ALICE_KEY, 9);
        bytes32 r;
        uint256 s;
        assembly ("memory-safe") {
            r := mload(add(good, 32))
            s := mload(add(good, 64))
        }
        uint8 v = uint8(good[64]) == 27 ? 28 : 27;
        expectCharge(one(alice, 9, 9, abi.encodePacked(r, CURVE_ORDER - s, v)), bad);
        expectCharge(one(alice, 9, 9, abi.encodePacked(good, uint8(0))), bad);
        expectCharge(one(alice, 9, 9, abi.encodePacked(r)), bad);
        // A signature from which nobody can be recovered is not the zero address's.
        bad = abi.encodeWithSelector(InferaSettlement.BadVoucher.selector, address(0));
        expectCharge(one(address(0), 9, 9, abi.encodePacked(r, s, uint8(99))), bad);
    }

    function testOnlyTheSettlerChargesAndOnlyForTheNewestBatch() public {
        depositFor(alice, 100);
        InferaSettlement.Charge[] memory charges = one(alice, 9, 9, voucher(ALICE_KEY, 9));
        bytes32 role = settlement.SETTLER_ROLE();
        VM.prank(STRANGER);
        VM.expectRevert(
            abi.encodeWithSelector(IAccessControl.AccessControlUnauthorizedAccount.selector, STRANGER, role)
        );
        settlement.charge(1, charges);
        VM.prank(SETTLER);
        VM.expectRevert(abi.encodeWithSelector(InferaSettlement.WrongSequence.selector, 1, 2));
        settlement.charge(2, charges);
        post(bytes32(0));
        VM.prank(SETTLER);
        VM.expectRevert(abi.encodeWithSelector(InferaSettlement.WrongSequence.selector, 2, 1));
        settlement.charge(1, charges);
    }

    function testManyAccountsInOneCharge(uint8 size, uint64 seed) public {
        uint256 count = bound(size, 1, 20);
        InferaSettlement.Charge[] memory charges = new InferaSettlement.Charge[](count);
        uint256 sum = 0;
        for (uint256 i = 0; i < count; i++) {
            uint256 key = 1_000 + i;
            uint256 amount = uint256(keccak256(abi.encode(seed, i))) % 1_000 + 1;
            depositFor(VM.addr(key), 1_000);
            charges[i] = one(VM.addr(key), amount, amount, voucher(key, amount))[0];
            sum += amount;
        }
        VM.prank(SETTLER);
        settlement.charge(1, charges);
        eq(settlement.totalFunded(), sum, "pool");
        eq(settlement.totalEscrow(), count * 1_000 - sum, "escrow");
    }

    function testOneAccountTwiceInOneChargePaysOnce() public {
        depositFor(alice, 100);
        InferaSettlement.Charge[] memory charges = new InferaSettlement.Charge[](2);
        charges[0] = one(alice, 60, 60, voucher(ALICE_KEY, 60))[0];
        charges[1] = charges[0];
        VM.prank(SETTLER);
        settlement.charge(1, charges);
        eq(account(alice).charged, 60, "charged");
        eq(settlement.totalFunded(), 60, "pool");
    }
}
