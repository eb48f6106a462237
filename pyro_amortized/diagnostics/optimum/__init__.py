"""What is the best q of the family?"""
