"""The contract that makes parts fit: specs, examples, batches, protocols, build, stages, evaluation."""
