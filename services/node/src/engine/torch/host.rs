//! Copies of logits on the host's side.

use tch::{Device, Kind, TchError, Tensor};

/// Rows that were copied from a device.
pub(super) struct Host {
    /// Memory that a GPU writes to directly.
    pinned: Option<Tensor>,
    rows: Vec<f32>,
    /// Whole rows of the present step.
    count: usize,
}

impl Host {
    /// With room for `numbers` at once.
    pub fn new(device: Device, numbers: usize) -> Result<Self, TchError> {
        let pinned = match device {
            Device::Cpu => None,
            device => {
                let plain = Tensor::f_zeros([numbers as i64], (Kind::Float, Device::Cpu))?;
                Some(plain.f_pin_memory(device)?)
            }
        };
        Ok(Self { pinned, rows: Vec::new(), count: 0 })
    }

    /// Forgets the last step's rows.
    pub fn clear(&mut self) {
        self.count = 0;
    }

    /// Adds rows of logits to the step's; gives the place of the first.
    pub fn fetch(&mut self, rows: &Tensor) -> Result<usize, TchError> {
        let (count, width) = rows.size2()?;
        let (first, numbers) = (self.count, (count * width) as usize);
        let start = first * width as usize;
        if self.rows.len() < start + numbers {
            self.rows.resize(start + numbers, 0.0);
        }
        let to = &mut self.rows[start..start + numbers];
        copy(self.pinned.as_ref(), rows, to)?;
        self.count += count as usize;
        Ok(first)
    }

    /// Reads other numbers.
    pub fn read(&mut self, numbers: &Tensor) -> Result<Vec<f32>, TchError> {
        let mut all = vec![0f32; numbers.numel()];
        copy(self.pinned.as_ref(), numbers, &mut all)?;
        Ok(all)
    }

    /// All whole rows of the step.
    pub fn rows(&self) -> &[f32] {
        &self.rows
    }
}

fn copy(pinned: Option<&Tensor>, from: &Tensor, to: &mut [f32]) -> Result<(), TchError> {
    let Some(pinned) = pinned else { return from.f_copy_data(to, to.len()) };
    let mut pinned = pinned.f_narrow(0, 0, to.len() as i64)?;
    pinned.f_copy_(&from.f_reshape([-1])?)?;
    pinned.f_copy_data(to, to.len())
}
