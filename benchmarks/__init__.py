"""Benchmarks, run from the root of the repository; each checks that its arms agree before it times them."""
