//! What a model needs on its device, known before anything is loaded.

use super::super::EngineConfig;
use super::super::device::Device;
use super::super::error::EngineError;
use super::super::kv::BLOCK;
use super::super::shape::{MIB, MemoryNeed, Shape};
use super::shim::Shim;
use super::weights::weight_bytes;
use super::{LOGIT_ROWS, STEP_ROWS};

/// What libraries and graphs take of a device beside what is counted: workspaces of the products and fragments.
const LIBRARIES: u64 = 512 * MIB;

/// Places of the cache, and tokens of each.
pub(in super::super) fn places(config: &EngineConfig) -> (usize, usize) {
    let all = config.slots + config.scorers;
    let Some(tokens) = config.cache_tokens else { return (all, config.max_context.next_multiple_of(BLOCK)) };
    let context = config.max_context.min(tokens).next_multiple_of(BLOCK);
    ((tokens / context).clamp(1, all), context)
}

/// Bytes that an engine of this configuration holds in bf16.
pub(in super::super) fn need(s: &Shape, config: &EngineConfig) -> MemoryNeed {
    let (count, context) = places(config);
    let row = 2 * (s.layers * 2 * s.kv_width()) as u64;
    // Of a piece: the residual stream, its norm, the widest product with its parts, and f32 copies of heads.
    let widest = (2 * s.ffn + s.query_width() + 2 * s.kv_width()).max(4 * s.width);
    let rows = (STEP_ROWS + LOGIT_ROWS) as u64;
    let masks =
        (STEP_ROWS * context * (1 + s.heads / s.kv_heads) * if s.window.is_some() { 2 } else { 1 }) as u64;
    let logits = (LOGIT_ROWS * s.vocabulary) as u64;
    MemoryNeed {
        weights: weight_bytes(s, config.device.torch(), context),
        cache: row * (count * context + 1) as u64,
        // Logits are there twice, and once more where their largest are looked for; those of next tokens have a place for
        // good.
        step: rows * 4 * (2 * s.width + 2 * widest) as u64
            + 2 * masks
            + 3 * 4 * logits
            + 4 * (count * s.vocabulary) as u64,
    }
}

/// Whether a device has room for it.
pub(super) fn check(need: &MemoryNeed, device: Device, shim: Option<Shim>) -> Result<(), EngineError> {
    let Some(shim) = shim else { return Ok(()) };
    let (free, _) = shim.memory().map_err(EngineError::Device)?;
    let wanted = need.weights + need.cache + need.step + LIBRARIES;
    if wanted <= free {
        return Ok(());
    }
    Err(EngineError::Device(format!(
        "{device} has {} MiB free, the model needs {} MiB ({} MiB of weights, {} MiB of cache for all slots): lower slots, \
         max_context or cache_tokens, or end what else runs there",
        free / MIB,
        wanted / MIB,
        need.weights / MIB,
        need.cache / MIB
    )))
}

#[cfg(test)]
mod tests {
    use super::super::graphs::tests::Fake;
    use super::*;

    #[test]
    fn what_does_not_fit_a_device_is_refused_before_it_is_loaded() {
        let fake = Fake::new(1);
        let need = |mib: u64| MemoryNeed { weights: mib * MIB, cache: 1000 * MIB, step: 400 * MIB };
        let check = |mib| check(&need(mib), Device::Cuda(3), Some(fake.shim()));
        // The stand-in has 3000 MiB free.
        check(1000).unwrap();
        let error = check(1089).unwrap_err().to_string();
        assert!(
            error
                .starts_with("cuda:3 has 3000 MiB free, the model needs 3001 MiB (1089 MiB of weights, 1000"),
            "{error}"
        );
        fake.fails("memory");
        assert!(check(1000).unwrap_err().to_string().starts_with("memory fails"));
        super::check(&need(1 << 20), Device::Cpu, None).unwrap();
    }
}
