// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {TimelockController} from "@openzeppelin/contracts/governance/TimelockController.sol";

/// @title Where every decision waits before it takes effect, in sight of all.
/// @notice Admin of the settlement contract, owner of the staking contract and of the model registry. OpenZeppelin's
/// timelock as it is; the deployer gives up its own admin role when all is wired (see the README).
contract InferaTimelock is TimelockController {
    /// @param minDelay seconds between the queueing and the execution of a decision
    /// @param proposers may queue (none here: the governor is granted the role when it stands)
    /// @param executors may execute what has waited; the zero address means everybody
    /// @param admin grants the first roles and then renounces its own
    constructor(uint256 minDelay, address[] memory proposers, address[] memory executors, address admin)
        TimelockController(minDelay, proposers, executors, admin)
    {}
}
