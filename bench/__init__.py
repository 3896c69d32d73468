"""The microbenchmark behind `fusedopt bench` and the training comparison behind `fusedopt demo`."""
