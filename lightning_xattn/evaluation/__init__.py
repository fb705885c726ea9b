"""The statistics of a data set: what is computed of a batch, how it is added up, and what the sums say."""
