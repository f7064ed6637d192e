"""Everything around the model: jobs, files and networks. Knows nothing of diffusers."""
