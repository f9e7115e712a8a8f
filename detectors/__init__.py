"""What is trained: detectors and the methods that train them, one file each."""
