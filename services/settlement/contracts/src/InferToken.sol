// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ERC20} from "@openzeppelin/contracts/token/ERC20/ERC20.sol";
import {ERC20Burnable} from "@openzeppelin/contracts/token/ERC20/extensions/ERC20Burnable.sol";
import {ERC20Permit} from "@openzeppelin/contracts/token/ERC20/extensions/ERC20Permit.sol";
import {ERC20Votes} from "@openzeppelin/contracts/token/ERC20/extensions/ERC20Votes.sol";
import {Nonces} from "@openzeppelin/contracts/utils/Nonces.sol";

/// @title INFER: what verified answers are paid in, and what votes.
/// @notice The whole supply exists from the start and can only shrink (slashed stake is burned): nobody can mint, no
/// vote can. Amounts are integers of 10^-6 INFER, as in the ledger.
/// @dev Votes are counted at timestamps, not block numbers, so that the periods of the governor mean the same on every
/// chain. Tokens vote only where their holder has delegated them.
contract InferToken is ERC20, ERC20Burnable, ERC20Permit, ERC20Votes {
    /// @notice What exists at the start: 10^9 INFER.
    uint256 public constant INITIAL_SUPPLY = 1_000_000_000e6;

    /// @param holder gets the whole supply
    constructor(address holder) ERC20("Infer", "INFER") ERC20Permit("Infer") {
        _mint(holder, INITIAL_SUPPLY);
    }

    /// @inheritdoc ERC20
    function decimals() public pure override returns (uint8) {
        return 6;
    }

    /// @notice The clock of votes: seconds since 1970.
    function clock() public view override returns (uint48) {
        return uint48(block.timestamp);
    }

    /// @notice ERC-6372's name of that clock.
    // solhint-disable-next-line func-name-mixedcase
    function CLOCK_MODE() public pure override returns (string memory) {
        return "mode=timestamp";
    }

    /// @inheritdoc ERC20Permit
    function nonces(address owner) public view override(ERC20Permit, Nonces) returns (uint256) {
        return super.nonces(owner);
    }

    function _update(address from, address to, uint256 value) internal override(ERC20, ERC20Votes) {
        super._update(from, to, value);
    }
}
