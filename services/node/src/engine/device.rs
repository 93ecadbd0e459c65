//! What computes: the processor or a GPU, as the operator chooses and the machine allows.

use std::fmt;
use std::str::FromStr;

use super::error::EngineError;
use super::{Class, torch};

/// libtorch's part for GPUs.
const LIBRARY: &str = "libtorch_cuda.so";

/// What an engine computes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Device {
    /// The processor.
    #[default]
    Cpu,
    /// The CUDA device with this number, from 0 on.
    Cuda(usize),
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(number) => write!(f, "cuda:{number}"),
        }
    }
}

/// What an operator asks for: `auto`, `cpu`, `cuda` or `cuda:N`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// A GPU if there is one and the class can be computed on it.
    #[default]
    Auto,
    /// This one.
    Only(Device),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':').map_or((text, None), |(kind, number)| (kind, Some(number))) {
            ("auto", None) => Ok(Self::Auto),
            ("cpu", None) => Ok(Self::Only(Device::Cpu)),
            ("cuda", None) => Ok(Self::Only(Device::Cuda(0))),
            ("cuda", Some(number)) => match number.parse() {
                Ok(number) => Ok(Self::Only(Device::Cuda(number))),
                Err(_) => Err(format!("`{number}` is no number of a GPU: write cuda:0, cuda:1, ...")),
            },
            _ => Err(format!("there is no device `{text}`: choose auto, cpu, cuda or cuda:N")),
        }
    }
}

impl Device {
    pub(super) fn torch(self) -> tch::Device {
        match self {
            Self::Cpu => tch::Device::Cpu,
            Self::Cuda(number) => tch::Device::Cuda(number),
        }
    }
}

/// Why there is no GPU, or how many.
fn gpus() -> Result<usize, String> {
    // libtorch looks for this part when it is first called, and never again.
    torch::preload(LIBRARY).map_err(|why| {
        format!("{LIBRARY} does not load ({why}): point LD_LIBRARY_PATH at the lib folder of a CUDA build of torch 2.11")
    })?;
    match (tch::Cuda::is_available(), tch::Cuda::device_count()) {
        (true, count @ 1..) => Ok(usize::try_from(count).unwrap_or(0)),
        _ => Err(format!("{LIBRARY} is loaded, but the driver shows no GPU: see nvidia-smi")),
    }
}

/// The device and the class to compute: what was asked for, or `bf16` on a GPU and `exact` on a processor. Before any
/// other call of libtorch in this process.
///
/// # Errors
/// [`EngineError::Device`]: what was asked for is not there, or cannot compute the class.
pub fn choose(choice: DeviceChoice, class: Option<Class>) -> Result<(Device, Class), EngineError> {
    choose_of(choice, class, gpus)
}

fn choose_of(
    choice: DeviceChoice,
    class: Option<Class>,
    gpus: impl FnOnce() -> Result<usize, String>,
) -> Result<(Device, Class), EngineError> {
    let on_cpu = |class: Option<Class>| Ok((Device::Cpu, class.unwrap_or(Class::Exact)));
    let refused = |text: String| Err(EngineError::Device(text));
    match (choice, class) {
        (DeviceChoice::Only(Device::Cpu), class)
        | (DeviceChoice::Auto, class @ Some(Class::Exact | Class::Fast)) => on_cpu(class),
        (DeviceChoice::Auto, class) => match gpus() {
            Ok(_) => Ok((Device::Cuda(0), Class::Bf16)),
            Err(why) => {
                tracing::info!(%why, "no gpu");
                on_cpu(class)
            }
        },
        (DeviceChoice::Only(Device::Cuda(_)), Some(class @ (Class::Exact | Class::Fast))) => {
            refused(format!(
                "the class {} is computed on the cpu: choose --class bf16, or --device cpu",
                class.name()
            ))
        }
        (DeviceChoice::Only(Device::Cuda(number)), _) => match gpus() {
            Ok(count) if number < count => Ok((Device::Cuda(number), Class::Bf16)),
            Ok(count) => {
                refused(format!("there is no cuda:{number}: the GPUs are cuda:0 to cuda:{}", count - 1))
            }
            Err(why) => refused(why),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_read_in_the_way_that_torch_writes_devices() {
        for (text, choice) in [
            ("auto", DeviceChoice::Auto),
            ("cpu", DeviceChoice::Only(Device::Cpu)),
            ("cuda", DeviceChoice::Only(Device::Cuda(0))),
            ("cuda:3", DeviceChoice::Only(Device::Cuda(3))),
        ] {
            assert_eq!(text.parse(), Ok(choice));
        }
        for text in ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "cpu:0", "auto:1"] {
            let error = text.parse::<DeviceChoice>().unwrap_err();
            assert!(error.contains("cuda"), "{error}");
        }
    }

    #[test]
    fn a_device_and_a_class_that_fit_each_other_are_chosen() {
        use Class::{Bf16, Exact, Fast};
        let (none, two) = (|| Err("no library".to_owned()), || Ok(2));
        let of = |text: &str, class, gpus: fn() -> Result<usize, String>| {
            choose_of(text.parse().unwrap(), class, gpus).map_err(|e| e.to_string())
        };
        for (text, class, without, with) in [
            ("auto", None, (Device::Cpu, Exact), (Device::Cuda(0), Bf16)),
            ("auto", Some(Exact), (Device::Cpu, Exact), (Device::Cpu, Exact)),
            ("auto", Some(Fast), (Device::Cpu, Fast), (Device::Cpu, Fast)),
            ("auto", Some(Bf16), (Device::Cpu, Bf16), (Device::Cuda(0), Bf16)),
            ("cpu", None, (Device::Cpu, Exact), (Device::Cpu, Exact)),
            ("cpu", Some(Bf16), (Device::Cpu, Bf16), (Device::Cpu, Bf16)),
        ] {
            assert_eq!(of(text, class, none), Ok(without), "{text} {class:?} without a gpu");
            assert_eq!(of(text, class, two), Ok(with), "{text} {class:?} with gpus");
        }
        assert_eq!(of("cuda:1", None, two), Ok((Device::Cuda(1), Bf16)));
        assert_eq!(of("cuda", Some(Bf16), two), Ok((Device::Cuda(0), Bf16)));
        for (text, class, gpus, expected) in [
            ("cuda", None, none as fn() -> _, "no library"),
            ("cuda:2", None, two, "there is no cuda:2: the GPUs are cuda:0 to cuda:1"),
            ("cuda", Some(Fast), two, "the class fast is computed on the cpu"),
            ("cuda", Some(Exact), none, "choose --class bf16, or --device cpu"),
        ] {
            let got = of(text, class, gpus).unwrap_err();
            assert!(got.contains(expected), "{got}");
        }
    }
}
