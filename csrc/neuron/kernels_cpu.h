// CPU kernels of the neuron family, one set an instruction set (see core/isa.h).
// pack returns whether every value had a code.
#pragma once
#include "../core/isa.h"
#include "neuron.h"

namespace pyaccel::neuron {

PYACCEL_DECLARE_KERNELS(                              //
    void lif_forward(const LifForward&);              //
    void lif_backward(const LifBackward&);            //
    void bntt_statistics(const BnttStatistics&);      //
    void bntt_forward(const BnttForward&);            //
    void bntt_backward(const BnttBackward&);          //
    void stdb_forward(const StdbForward&);            //
    void stdb_backward(const StdbBackward&);          //
    bool pack(const Planes&);                         //
    void unpack(const Planes&);                       //
    void encode(const Encode&);)

}  // namespace pyaccel::neuron
