"""What comes in: the sheet, the raw counts of every sample, their quality, and the genes that the models see."""
