"""Block plans: which key blocks each query block sees. Kernels know nothing else."""
