"""What a bundle is made of: staging, files, the reference, PSNR, and rows of a report."""
