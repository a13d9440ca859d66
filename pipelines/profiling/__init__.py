"""The parts of pipelines/profile.py: what is run and watched, what is summed up, drawn and suggested."""
