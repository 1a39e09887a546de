"""Sources, splits, decoding, augmentation and the pipeline that joins them."""
