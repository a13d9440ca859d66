"""What `upcycle_bam` is made of."""
