from accountants import *
from accountants import rounding as rounding
