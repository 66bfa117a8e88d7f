"""Small models of many architectures, built offline from configs: the test data of the sweeps."""
