"""What does z tell of x?"""
