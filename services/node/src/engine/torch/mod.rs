//! The forward pass with libtorch, for a GPU; on a processor it computes the same class, slowly.
//!
//! The class `bf16`: weights, activations, keys and values in bf16; norms, the rotary embedding, the softmax and all sums
//! in f32; logits in f32. libtorch's products depend on the batch by a rounding, so results of this class agree up to
//! near-ties, not bit for bit.
//!
//! A step has two passes. Next tokens are computed for the first 1, 2, 4, ... places of the cache at once, with the places
//! that have none as idle rows: addresses and shapes are the same whenever batch and longest sequence are of the same
//! size, so that one [`graphs::Graphs`] replays it. Pieces of prompts and answers to be scored share the other pass,
//! which is as large as they are.

mod graphs;
mod host;
mod memory;
mod net;
mod places;
mod shim;
mod weights;

use std::path::Path;

use infera_kernels::Cpu;
use tch::{Kind, Tensor};

use super::cpu::Span;
use super::device::Device;
use super::error::EngineError;
use super::logits::{Logits, Place, Top};
use super::source::Source;
use super::{EngineConfig, MAX_PLACES};

use graphs::Graphs;
use host::Host;
pub(super) use memory::{need, places};
use net::{Net, Output};
pub(super) use places::{Move, Places};
pub(super) use shim::{Shim, preload};
use weights::Numerics;

/// Rows of prompts in a step at most.
pub(super) const STEP_ROWS: usize = 1024;
/// Rows of a step whose logits are computed at most: one for each sequence at least.
pub(super) const LOGIT_ROWS: usize = MAX_PLACES;
/// From this batch on the device picks the largest logits; smaller ones are copied as a whole.
const CUT_BATCH: usize = 8;
/// Tokens that the attention of a batch goes over at least.
const LEAST_REACH: usize = 128;

/// A loaded model with its cache.
pub(super) struct Model {
    net: Net,
    /// Tokens, positions and rows of the cache of a batch, one after another, always at the same address.
    inputs: Tensor,
    graphs: Graphs<Output>,
    host: Host,
    cpu: Cpu,
    /// Where the rows of the last step's logits are.
    rows: Vec<Place>,
}

impl Model {
    /// Reads the weights.
    pub fn load(source: &Source, config: &EngineConfig) -> Result<Self, EngineError> {
        let numerics = Numerics { device: config.device.torch(), kind: Kind::BFloat16 };
        let shim = shim_for(config.device)?;
        match shim {
            Some(shim) => shim.setup().map_err(EngineError::Device)?,
            None if config.device == Device::Cpu => {}
            None => tracing::warn!(
                "no libinfera_cuda_graphs.so (deploy/gpu/build-shim): decoding is slower, a pause keeps memory, and \
                 sums of products may be rounded to bf16 on the way"
            ),
        }
        memory::check(&need(&source.shape(), config), config.device, shim)?;
        Self::with(source, config, numerics, shim)
    }

    fn with(
        source: &Source,
        config: &EngineConfig,
        numerics: Numerics,
        shim: Option<Shim>,
    ) -> Result<Self, EngineError> {
        // The same for all of libtorch in this process.
        tch::set_num_threads(i32::try_from(config.threads).unwrap_or(1));
        let _guard = tch::no_grad_guard();
        let (count, context) = places(config);
        let batch = places::bucket(count);
        Ok(Self {
            net: Net::load(source, numerics, count, context)?,
            inputs: Tensor::f_zeros([3 * batch as i64], (Kind::Int64, numerics.device))?,
            graphs: Graphs::new(shim),
            host: Host::new(numerics.device, LOGIT_ROWS * source.shape().vocabulary)?,
            cpu: Cpu::new(config.threads)?,
            rows: Vec::new(),
        })
    }

    /// Copies beginnings from place to place, in this order.
    pub fn carry_out(&mut self, moves: &[Move]) -> Result<(), EngineError> {
        let _guard = tch::no_grad_guard();
        moves.iter().try_for_each(|m| self.net.copy(*m))
    }

    /// One step: writes keys and values of all tokens to the cache and computes the wanted logits.
    ///
    /// At most [`STEP_ROWS`] tokens beside one for each place, and [`LOGIT_ROWS`] rows of logits.
    pub fn forward(&mut self, spans: &[Span<'_>]) -> Result<(), EngineError> {
        let _guard = tch::no_grad_guard();
        self.host.clear();
        let (next, pieces): (Vec<usize>, Vec<usize>) =
            (0..spans.len()).partition(|i| spans[*i].tokens.len() == 1);
        let mut rows = vec![Vec::new(); spans.len()];
        if !next.is_empty() {
            let of: Vec<&Span<'_>> = next.iter().map(|i| &spans[*i]).collect();
            for (i, place) in next.iter().zip(self.next_tokens(&of)?) {
                rows[*i].extend(place.filter(|_| spans[*i].logits > 0));
            }
        }
        if !pieces.is_empty() {
            let of: Vec<&Span<'_>> = pieces.iter().map(|i| &spans[*i]).collect();
            if let Some(logits) = self.net.pieces(&of)? {
                let first = self.host.fetch(&logits)?;
                let mut all = first..;
                for i in pieces {
                    rows[i].extend(all.by_ref().take(spans[i].logits).map(Place::Whole));
                }
            }
        }
        self.rows = rows.into_iter().flatten().collect();
        Ok(())
    }

    /// One token of each span, as a batch of the first places.
    fn next_tokens(&mut self, spans: &[&Span<'_>]) -> Result<Vec<Option<Place>>, EngineError> {
        let used = spans.iter().map(|s| s.blocks[0] as usize + 1).max().unwrap_or(1);
        let longest = spans.iter().map(|s| s.position + 1).max().unwrap_or(1);
        let batch = places::bucket(used).min(self.net.places);
        let reach = longest.next_power_of_two().max(LEAST_REACH).min(self.net.context);
        // An idle row writes beside the places.
        let mut inputs = vec![0i64; 3 * batch];
        inputs[2 * batch..].fill(self.net.spare_row());
        for span in spans {
            let place = span.blocks[0] as usize;
            inputs[place] = i64::from(span.tokens[0]);
            inputs[batch + place] = span.position as i64;
            inputs[2 * batch + place] = self.net.row(place, span.position);
        }
        let mut fixed = self.inputs.f_narrow(0, 0, 3 * batch as i64)?;
        fixed.f_copy_(&Tensor::f_from_slice(&inputs)?)?;
        let (net, cut) = (&self.net, batch >= CUT_BATCH);
        let output = self.graphs.run((batch, reach), &mut || net.next_tokens(&fixed, batch, reach, cut))?;
        match &output.top {
            Some(top) => {
                let tops = tops(&self.host.read(top)?, batch);
                spans
                    .iter()
                    .map(|span| {
                        let place = span.blocks[0] as usize;
                        match tops[place].clone().filter(|_| !span.whole) {
                            Some(top) => Ok(Some(Place::Top(top))),
                            None => {
                                let row = output.logits.f_narrow(0, place as i64, 1)?;
                                Ok(Some(Place::Whole(self.host.fetch(&row)?)))
                            }
                        }
                    })
                    .collect()
            }
            None => {
                let first = self.host.fetch(&output.logits)?;
                Ok(spans.iter().map(|s| Some(Place::Whole(first + s.blocks[0] as usize))).collect())
            }
        }
    }

    /// The logits of the last step, and the processor to work on them.
    pub fn logits(&mut self) -> (Logits<'_>, &mut Cpu) {
        let vocabulary = self.net.shape.vocabulary;
        let logits =
            Logits { rows: self.host.rows(), stride: vocabulary, vocabulary, places: Some(&self.rows) };
        (logits, &mut self.cpu)
    }
}

/// What [`Net::next_tokens`] packed, for each row of the batch.
fn tops(packed: &[f32], batch: usize) -> Vec<Option<Top>> {
    packed
        .chunks_exact(packed.len() / batch)
        .map(|row| {
            let count = row.len() / 2;
            let (values, tokens) = row[..2 * count].split_at(count);
            let found = tokens.iter().map(|t| *t as u32).zip(values.iter().copied()).collect();
            Top::new(found, row[2 * count])
        })
        .collect()
}

fn shim_for(device: Device) -> Result<Option<Shim>, EngineError> {
    let Device::Cuda(number) = device else { return Ok(None) };
    Ok(Shim::find().map_err(EngineError::Device)?.map(|shim| shim.on(number)))
}

/// Gives the memory that libtorch's allocator and the processor's hold back; nothing of the model may be in use.
pub(super) fn release(config: &EngineConfig) {
    if config.class != super::Class::Bf16 {
        return;
    }
    shim::trim();
    let released = match shim_for(config.device) {
        Ok(Some(shim)) => shim.release(),
        Ok(None) => return,
        Err(why) => Err(why.to_string()),
    };
    if let Err(why) = released {
        tracing::warn!(%why, device = %config.device, "the device's memory stays allocated");
    }
}

/// Logits after each token from the one at `prefilled - 1` on, as the engine computes them with libtorch on the
/// processor, in f32 or bf16: the first `prefilled` tokens in pieces of `piece`, the others one by one.
///
/// # Errors
/// The model cannot be loaded, `prefilled` is not 1 to the number of tokens, or libtorch refuses an operation.
#[doc(hidden)]
pub fn torch_logits(
    path: &Path,
    bf16: bool,
    tokens: &[u32],
    (prefilled, piece): (usize, usize),
) -> Result<Vec<Vec<f32>>, EngineError> {
    super::in_range("prefilled", "1 to the number of tokens", prefilled, tokens.len())?;
    let config = EngineConfig {
        model_path: path.to_owned(),
        class: super::Class::Bf16,
        device: Device::Cpu,
        slots: 2,
        scorers: 0,
        threads: 1,
        max_context: tokens.len(),
        cache_tokens: None,
        memory_limit: None,
        rounding: None,
    };
    let kind = if bf16 { Kind::BFloat16 } else { Kind::Float };
    let numerics = Numerics { device: tch::Device::Cpu, kind };
    let mut model = Model::with(&Source::open(path)?, &config, numerics, None)?;
    let (mut all, mut position) = (Vec::new(), 0);
    while position < tokens.len() {
        let end = if position < prefilled { (position + piece).min(prefilled) } else { position + 1 };
        let logits = usize::from(end >= prefilled);
        let tokens = &tokens[position..end];
        model.forward(&[Span { tokens, position, blocks: &[1], logits, whole: true }])?;
        if logits > 0 {
            all.push(model.logits().0.row(0).whole().to_vec());
        }
        position = end;
    }
    Ok(all)
}
