"""The parts of pipelines/doctor.py: a model without its weights, its tokens at a size, this machine, the findings."""
