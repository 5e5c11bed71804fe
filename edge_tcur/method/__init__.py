"""The mathematics of tCURLoRA in pure torch: t-product, selection, groups, adapted layers. No I/O."""
