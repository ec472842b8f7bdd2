from accountants import *
from accountants import commands as commands
from accountants import figures as figures
from accountants import rounding as rounding
