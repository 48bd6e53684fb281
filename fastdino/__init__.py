"""fastdino"""
