//! Pipelines undone against how they are applied, and against damage.
