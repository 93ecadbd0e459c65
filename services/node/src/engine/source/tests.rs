//! Opening models.
