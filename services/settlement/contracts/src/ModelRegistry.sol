// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Ownable} from "@openzeppelin/contracts/access/Ownable.sol";
import {EnumerableSet} from "@openzeppelin/contracts/utils/structs/EnumerableSet.sol";

/// @title What the network serves: models, the releases of the node program, and the calibration.
/// @notice Owned by the timelock: a model comes, changes and goes by vote. Services read the whole state by `modelIds`,
/// `model`, `releases` and `calibrationHash`, and follow the events from there; `revision` tells whether they missed one.
contract ModelRegistry is Ownable {
    using EnumerableSet for EnumerableSet.Bytes32Set;

    /// @notice Most models that were ever listed, and most approved releases, so that the lists can be read in one call.
    uint256 public constant MAX_LISTED = 1_024;
    /// @notice Longest model id, bytes.
    uint256 public constant MAX_ID_BYTES = 64;
    /// @notice Cosine similarity is counted in millionths.
    uint32 public constant FULL_SIMILARITY = 1_000_000;

    /// @notice A model and the rules by which its answers are compared and priced.
    struct Model {
        /// BLAKE3 of the weights file.
        bytes32 weightsRoot;
        /// BLAKE3 of the tokenizer.
        bytes32 tokenizerHash;
        /// BLAKE3 of the chat template.
        bytes32 templateHash;
        /// keccak-256 of the end tokens, each as four big-endian bytes, in ascending order.
        bytes32 endTokensHash;
        uint32 vocabSize;
        /// Prompt and answer together, tokens.
        uint32 contextLength;
        /// Cosine of the answers' embeddings below which two answers disagree, in millionths.
        uint32 similarityThreshold;
        /// The most that a token may cost per replica, 10^-6 INFER.
        uint64 priceCap;
        /// Served. A withdrawn model stays readable, so that old receipts can be checked.
        bool active;
    }

    /// @notice A model is served from now on, with these values. Also when a withdrawn one comes back or one is replaced.
    event ModelAdmitted(bytes32 indexed key, string id, Model model, uint64 revision);
    /// @notice A model's rules changed.
    event ModelTermsChanged(
        bytes32 indexed key, string id, uint32 similarityThreshold, uint64 priceCap, uint64 revision
    );
    /// @notice A model is no longer served: requests that were admitted are finished, new ones are refused.
    event ModelWithdrawn(bytes32 indexed key, string id, uint64 revision);
    /// @notice Nodes with this release of the node program get work.
    event ReleaseApproved(bytes32 indexed release, string name, uint64 revision);
    /// @notice Nodes with this release get no new work.
    event ReleaseWithdrawn(bytes32 indexed release, uint64 revision);
    /// @notice Tolerances and margins are those of the calibration with this hash.
    event CalibrationChanged(bytes32 indexed calibrationHash, uint64 revision);

    /// @notice A value that cannot be right; `field` names it.
    error BadValue(string field);
    /// @notice The model is not served.
    error NoSuchModel(string id);
    /// @notice The release is approved already.
    error AlreadyApproved(bytes32 release);
    /// @notice The release is not approved.
    error NotApproved(bytes32 release);

    EnumerableSet.Bytes32Set private _keys;
    EnumerableSet.Bytes32Set private _releases;
    mapping(bytes32 key => Model) private _models;
    mapping(bytes32 key => string id) private _ids;

    /// @notice The calibration in force; its hash stands in every receipt.
    bytes32 public calibrationHash;
    /// @notice Grows by one with every change.
    uint64 public revision;

    /// @param owner_ the timelock, or a deployer that lists the first models and then hands over
    constructor(address owner_) Ownable(owner_) {}

    // ---- models ----

    /// @notice Lists a model, or lists it anew with other values.
    /// @param id the name that clients ask for, 1 to `MAX_ID_BYTES` bytes
    function admitModel(string calldata id, Model calldata model_) external onlyOwner {
        _check(id, model_);
        bytes32 key = keyOf(id);
        if (_keys.add(key)) {
            if (_keys.length() > MAX_LISTED) revert BadValue("models");
            _ids[key] = id;
        }
        _models[key] = model_;
        emit ModelAdmitted(key, id, model_, _next());
    }

    /// @notice Changes by which threshold a model's answers are compared, and what they may cost.
    function setTerms(string calldata id, uint32 similarityThreshold, uint64 priceCap) external onlyOwner {
        bytes32 key = keyOf(id);
        Model storage listed = _models[key];
        if (!listed.active) revert NoSuchModel(id);
        _checkTerms(similarityThreshold, priceCap);
        listed.similarityThreshold = similarityThreshold;
        listed.priceCap = priceCap;
        emit ModelTermsChanged(key, id, similarityThreshold, priceCap, _next());
    }

    /// @notice Ends the serving of a model.
    function withdrawModel(string calldata id) external onlyOwner {
        bytes32 key = keyOf(id);
        if (!_models[key].active) revert NoSuchModel(id);
        _models[key].active = false;
        emit ModelWithdrawn(key, id, _next());
    }

    /// @notice A model by its name; all zero if it was never listed.
    function model(string calldata id) external view returns (Model memory) {
        return _models[keyOf(id)];
    }

    /// @notice The names of all models that were ever listed.
    function modelIds() external view returns (string[] memory ids) {
        ids = new string[](_keys.length());
        for (uint256 i = 0; i < ids.length; i++) {
            ids[i] = _ids[_keys.at(i)];
        }
    }

    /// @notice What stands for a model's name in events.
    function keyOf(string calldata id) public pure returns (bytes32) {
        return keccak256(bytes(id));
    }

    // ---- releases and calibration ----

    /// @notice Lets nodes with this release work.
    /// @param release hash of the node program
    /// @param name for people, such as "0.3.1 linux x86_64"
    function approveRelease(bytes32 release, string calldata name) external onlyOwner {
        if (release == bytes32(0)) revert BadValue("release");
        if (!_releases.add(release)) revert AlreadyApproved(release);
        if (_releases.length() > MAX_LISTED) revert BadValue("releases");
        emit ReleaseApproved(release, name, _next());
    }

    /// @notice Lets them no longer.
    function withdrawRelease(bytes32 release) external onlyOwner {
        if (!_releases.remove(release)) revert NotApproved(release);
        emit ReleaseWithdrawn(release, _next());
    }

    /// @notice Whether nodes with this release may work.
    function isApproved(bytes32 release) external view returns (bool) {
        return _releases.contains(release);
    }

    /// @notice All approved releases.
    function releases() external view returns (bytes32[] memory) {
        return _releases.values();
    }

    /// @notice Puts a calibration in force.
    function setCalibration(bytes32 hash) external onlyOwner {
        if (hash == bytes32(0)) revert BadValue("calibrationHash");
        calibrationHash = hash;
        emit CalibrationChanged(hash, _next());
    }

    function _next() private returns (uint64) {
        return ++revision;
    }

    function _check(string calldata id, Model calldata model_) private pure {
        if (bytes(id).length == 0 || bytes(id).length > MAX_ID_BYTES) revert BadValue("id");
        if (model_.weightsRoot == bytes32(0)) revert BadValue("weightsRoot");
        if (model_.tokenizerHash == bytes32(0)) revert BadValue("tokenizerHash");
        if (model_.templateHash == bytes32(0)) revert BadValue("templateHash");
        if (model_.endTokensHash == bytes32(0)) revert BadValue("endTokensHash");
        if (model_.vocabSize == 0) revert BadValue("vocabSize");
        if (model_.contextLength == 0) revert BadValue("contextLength");
        if (!model_.active) revert BadValue("active");
        _checkTerms(model_.similarityThreshold, model_.priceCap);
    }

    function _checkTerms(uint32 similarityThreshold, uint64 priceCap) private pure {
        if (similarityThreshold > FULL_SIMILARITY) revert BadValue("similarityThreshold");
        if (priceCap == 0) revert BadValue("priceCap");
    }
}
