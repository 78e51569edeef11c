"""Generate text from a model whose attention is instrumented: `Model.generate`."""
