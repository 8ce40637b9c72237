"""extemb"""
