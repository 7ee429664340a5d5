"""One federated job on other engines, each written as its own users would write it when they want speed. For benchmarks only."""
