"""What ships with the package: the demo corpus and the trait "sycophantic", both written for this project."""
