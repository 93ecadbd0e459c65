// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ERC20} from "@openzeppelin/contracts/token/ERC20/ERC20.sol";
import {ReentrancyGuardTransient} from "@openzeppelin/contracts/utils/ReentrancyGuardTransient.sol";
import {Network} from "./Base.sol";
import {InferToken} from "../src/InferToken.sol";
import {InferaSettlement} from "../src/InferaSettlement.sol";
import {InferaStaking} from "../src/InferaStaking.sol";

/// A token that calls a thief back in the middle of every transfer, as some tokens do, or keeps a part of it.
contract HookToken is ERC20 {
    Thief private _thief;
    uint256 private _fee;

    constructor() ERC20("Hook", "HOOK") {
        _mint(msg.sender, 1_000_000);
    }

    function set(Thief thief, uint256 fee) external {
        (_thief, _fee) = (thief, fee);
    }

    function burn(uint256 amount) external {
        _burn(msg.sender, amount);
    }

    function _update(address from, address to, uint256 amount) internal override {
        super._update(from, to, amount - _fee);
        if (address(_thief) != address(0)) _thief.called();
    }
}

/// A receiver that uses the moment in which it is paid to ask for the same again.
contract Thief {
    address private _target;
    bytes private _call;
    bool public tried;
    bytes public answer;

    function arm(address target, bytes calldata data) external {
        (_target, _call, tried) = (target, data, false);
    }

    function run(address target, bytes calldata data) external {
        (bool ok, bytes memory result) = target.call(data);
        if (!ok) {
            assembly ("memory-safe") {
                revert(add(result, 32), mload(result))
            }
        }
    }

    function called() external {
        if (_target == address(0) || tried) return;
        tried = true;
        bool ok;
        (ok, answer) = _target.call(_call);
        require(!ok, "the second call went through");
    }
}

/// The contracts' own guard and order of writes, shown with a token that is as bad as can be.
contract ReentrancyTest is Network {
    HookToken private hook;
    Thief private thief;
    InferaSettlement private victim;
    InferaStaking private stakes;
    bytes private reentered;

    function setUp() public {
        deploy();
        hook = new HookToken();
        thief = new Thief();
        victim = new InferaSettlement(hook, address(timelock), SETTLER, GUARDIAN, CHALLENGE, WITHDRAWAL);
        stakes = new InferaStaking(address(timelock), InferToken(address(hook)), victim, UNBONDING, 0);
        reentered = abi.encodeWithSelector(ReentrancyGuardTransient.ReentrancyGuardReentrantCall.selector);
        hook.approve(address(victim), type(uint256).max);
        hook.approve(address(stakes), type(uint256).max);
        victim.deposit(alice, 1_000);
        victim.deposit(address(thief), 100);
        hook.set(thief, 0);
    }

    function check(address target, bytes memory again) private {
        thief.arm(target, again);
    }

    function checkTried() private view {
        assert(thief.tried());
        eq(keccak256(thief.answer()), keccak256(reentered), "answer");
    }

    function testNoSecondWithdrawalWithinTheFirst() public {
        thief.run(address(victim), abi.encodeCall(victim.requestWithdrawal, (100)));
        VM.warp(START + WITHDRAWAL);
        check(address(victim), abi.encodeCall(victim.withdraw, ()));
        thief.run(address(victim), abi.encodeCall(victim.withdraw, ()));
        checkTried();
        eq(hook.balanceOf(address(thief)), 100, "paid once");
        eq(hook.balanceOf(address(victim)), 1_000, "the others' money");
    }

    function testNoSecondClaimWithinTheFirst() public {
        victim.fund(500);
        bytes32 root = rewardLeaf(address(thief), 200);
        VM.startPrank(SETTLER);
        victim.postBatch(1, bytes32(0), keccak256("receipts"), 1, root, 0);
        victim.queueRewards(InferaSettlement.Batch(1, bytes32(0), keccak256("receipts"), 1, root, 0), 500);
        VM.stopPrank();
        VM.warp(START + CHALLENGE);
        bytes memory claim = abi.encodeCall(victim.claim, (1, address(thief), 200, new bytes32[](0)));
        check(address(victim), claim);
        thief.run(address(victim), claim);
        checkTried();
        eq(hook.balanceOf(address(thief)), 200, "paid once");
    }

    /// A deposit within a deposit would count the inner amount twice where balances are compared.
    function testNoDepositWithinADeposit() public {
        check(address(victim), abi.encodeCall(victim.deposit, (address(thief), 1)));
        victim.deposit(alice, 10);
        checkTried();
        eq(victim.totalEscrow(), 1_110, "escrow");
        eq(hook.balanceOf(address(victim)), 1_110, "balance");
    }

    function testNoSecondUnstakingWithinTheFirst() public {
        stakes.stake(address(thief), 50);
        stakes.stake(alice, 500);
        thief.run(address(stakes), abi.encodeCall(stakes.unstake, (50)));
        VM.warp(START + UNBONDING);
        check(address(stakes), abi.encodeCall(stakes.withdraw, ()));
        thief.run(address(stakes), abi.encodeCall(stakes.withdraw, ()));
        checkTried();
        eq(hook.balanceOf(address(thief)), 50, "paid once");
    }

    function testATokenThatKeepsAPartIsRefused() public {
        hook.set(Thief(address(0)), 1);
        VM.expectRevert(abi.encodeWithSelector(InferaSettlement.WrongAmountReceived.selector, 10, 9));
        victim.deposit(alice, 10);
        VM.expectRevert(abi.encodeWithSelector(InferaSettlement.WrongAmountReceived.selector, 10, 9));
        victim.fund(10);
    }
}
