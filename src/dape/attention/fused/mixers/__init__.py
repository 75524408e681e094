"""The kernels across heads: an object for every kind of terms that mixes heads."""
