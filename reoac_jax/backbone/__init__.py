"""Diffusion language models behind one forward contract (`reoac_jax.backbone.base`)."""
