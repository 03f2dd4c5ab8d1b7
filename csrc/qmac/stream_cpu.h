// Small batches: the packed weights pass once (see stream_cpu.cpp).
#pragma once
#include "../core/isa.h"
#include "qmac.h"

namespace pyaccel::qmac {

PYACCEL_DECLARE_KERNELS(bool stream(const Linear&);)  // false where the tiled form serves better; Q is the caller's

}  // namespace pyaccel::qmac
