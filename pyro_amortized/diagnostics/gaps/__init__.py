"""Which gap dominates?"""
