"""The Ray Train workers that train the trials, and the broker that seats the trials on them."""
