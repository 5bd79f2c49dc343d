"""One search over architecture, precision, sparsity and schedule of language models, for a chip and a workload."""
