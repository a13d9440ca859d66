"""What `mip_sdxl` is made of."""
