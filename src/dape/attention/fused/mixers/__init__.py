"""The kernels across heads: an object for each kind of terms that mixes heads."""
